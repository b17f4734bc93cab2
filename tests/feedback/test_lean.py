"""The torch backend against the lean contestants of the bench: no more than 1.15 of their operations and bytes."""

import pytest
import torch

from bench.rivals.feedback import lean_matrix
from lgkernels.ops.feedback import torch as lean
from lgkernels.ops.feedback.reference import pack_signs
from tests.feedback.common import made, randn
from tests.support.counting import assert_lean, at_most, count

pytestmark = pytest.mark.unpoisoned  # which writes
M, N, K, SCALE = 16, 192, 256, 0.25
STATE = torch.tensor([5, 3, 0])
RULES = {"usf": {}, "frsf": dict(law="uniform8", scale=0.5, low=0.0), "brsf": dict(law="uniform", scale=0.5, low=0.0)}


def counts(ours, theirs):
    return count(*ours), count(*theirs)


def formula(rule, weight, scale=SCALE):
    law = RULES.get(rule)
    random = (STATE, law["law"], law["scale"], law["low"]) if law else None
    return made(None if rule == "fa" else weight, None, random, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_product(rule, dtype):
    grad, weight, magnitude = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(M, N), (N, K), (N, K)]))

    def contestant():
        return grad @ lean_matrix(weight, rule, magnitude, SCALE)

    assert_lean(rule, *counts((lean.product, grad, K, formula(rule, weight)), (contestant,)))


@pytest.mark.parametrize("rule", RULES)
def test_matrix(rule):
    weight, magnitude = randn(N, K), randn(N, K, seed=1)
    ours = lean.matrix, (N, K), formula(rule, weight, 1.0 if rule != "usf" else SCALE), torch.float32, weight.device
    assert_lean(rule, *counts(ours, (lean_matrix, weight, rule, magnitude, SCALE)))


def test_product_of_a_given_magnitude():
    """The contestant takes it for positive; with the absolute value that the definition asks for it is ours."""
    grad, weight, magnitude = randn(M, N), randn(N, K), randn(N, K, seed=1)

    def contestant():
        return (grad @ weight.sign().mul_(magnitude.abs())).mul_(SCALE)

    assert_lean("frsf", *counts((lean.product, grad, K, made(weight, magnitude, None, SCALE)), (contestant,)))


def test_a_given_matrix_is_not_copied():
    grad, magnitude = randn(M, N), randn(N, K, seed=1)
    f = made(None, magnitude, None, SCALE)
    assert_lean("fa", *counts((lean.product, grad, K, f), (torch.matmul, grad, magnitude)), factor=1.01)


def test_signs_from_bits_are_read_as_bits():
    grad, weight = randn(M, N), randn(N, K)
    packed = count(lean.product, grad, K, made(pack_signs(weight), None, None, SCALE, True))
    written = 4 * (2 * N * K + N * K // 4 + 2 * N * K // 8 + N * K // 32 + M * N + M * K)  # F in and out, bytes twice
    assert packed.bytes <= 1.15 * written and packed.operations <= 10
    with at_most(6):
        lean.pack_signs(weight)
