"""The torch backend against the lean contestants of the bench: no more than 1.15 of their operations and bytes."""

import pytest
import torch

from bench.local_loss import HALF, Case, CrossEntropy, Goodness, Similarity
from lgkernels.ops.local_loss import torch as lean
from tests.support.counting import assert_lean, count

pytestmark = pytest.mark.unpoisoned  # which writes
SIZES = dict(batch=16, channels=32, size=14, classes=10)
ONE = torch.ones(())


def cross_entropy(problem, h):
    weight = problem.weight.detach()
    _, *saved = lean.local_cross_entropy(h, weight, None, problem.target, 0.0, "mean", True)
    return lean.local_cross_entropy_grads(ONE, *saved, h.dtype, True, True, False)


def goodness(problem, h):
    _, kappa, _ = lean.goodness(h, problem.positive, problem.threshold, True, True)
    return lean.goodness_grad(h, kappa, ONE)


def similarity(problem, h):
    _, grad, mean = lean.similarity(h, problem.target, SIZES["classes"], True, True)
    return lean.similarity_grad(h, grad, mean, ONE)


@pytest.mark.parametrize("layout", [{}, HALF], ids=["float32", "half"])
@pytest.mark.parametrize("kind, ours", [(CrossEntropy, cross_entropy), (Goodness, goodness), (Similarity, similarity)])
def test_lean(kind, ours, layout):
    case = Case(kind, **SIZES, **layout)
    problem = case.problem(case, torch.device("cpu"))
    h = problem.input.detach()
    ours(problem, h), problem.lean(h)  # what the problem makes at first use is not counted
    assert_lean(kind.__name__, count(ours, problem, h), count(problem.lean, h))
