"""The trial of the offset step, whose tensors come in lists: of the op, and of the optimizer that keeps its launches.

Triton's interpreter stands in for a GPU's kernels, the CPU for the GPU.
"""

import warnings

import pytest
import torch

from lgkernels.core import dispatch, trial, trust, verdicts
from lgkernels.ops.offset import op, reference
from lgkernels.ops.offset.trials import TRIALS
from lgkernels.optim import OffsetSGD
from tests.integration.test_trust import entries, stand_in  # noqa: F401
from tests.support.problems import randn

kernels = pytest.importorskip("lgkernels.ops.offset.triton")
NUMBERS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, local_scale=0.7, offset_scale=1.5, grad_scale=0.5)


def step(offset_dtype=torch.float32, **changes):
    """One call of the op by `auto`; the parameters after it."""
    numbers = {**NUMBERS, **changes}
    lists = [[randn(n, seed=10 * n + k) for n in (7, 40)] for k in range(4)]
    lists[2] = lists[2] if numbers["momentum"] else []
    lists[3] = [offset.to(offset_dtype) for offset in lists[3]]
    torch.ops.lgkernels.offset_sgd_(*lists, *numbers.values(), "auto")
    return lists[0]


def optimizer():
    params = [torch.nn.Parameter(randn(n, seed=n)) for n in (7, 40)]
    made = OffsetSGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = randn(*p.shape, seed=3)
        made._set_offset(p, randn(*p.shape, seed=4))
    return made, params


@pytest.fixture
def runs(monkeypatch):
    """Sizes of the lists that the kernels have been given."""
    made, right = [], kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda params, *a: made.append(len(params)) or right(params, *a))
    return made


def test_one_trial_for_all_sizes_of_a_kind(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = step()
    assert runs == [5, 5, 2] and set(entries().values()) == {verdicts.GOOD}
    step(lr=0.3, weight_decay=0.0)
    assert runs == [5, 5, 2, 2], "another rate is no other kernel"
    step(momentum=0.0)
    step(torch.bfloat16)
    step(offset_scale=0.0)
    assert len(entries()) == 4 and set(entries().values()) == {verdicts.GOOD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LGKERNELS_IMPL", "reference")
        for mine, theirs in zip(first, step()):
            torch.testing.assert_close(mine, theirs)


def _one_lane(params):
    params[2][8191] += 0.01


def _the_last_of_a_chunk(params):
    params[2][-1] += 0.01


def _askew(params):
    params[3][0] += 0.01


def _beyond_the_end(params):
    params[1].as_strided((params[1].numel() + 1,), (1,))[-1] = 3.0


@pytest.mark.parametrize("fault", [_one_lane, _the_last_of_a_chunk, _askew, _beyond_the_end], ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_caught(fault, monkeypatch):
    right = kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda params, *a: (right(params, *a), len(params) == 5 and fault(params)))
    with pytest.warns(UserWarning, match="the triton kernels of offset_sgd_ failed"):
        step()
    assert list(entries().values()) == [verdicts.BAD]


def test_an_input_that_is_written_is_caught(monkeypatch):
    right = kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda params, grads, *a: (right(params, grads, *a), grads[3].add_(1)))
    with pytest.warns(UserWarning, match="it wrote to its input grads"):
        step()


def test_the_optimizer_takes_kernels_that_have_passed_and_keeps_their_table(runs):
    made, _ = optimizer()
    made.step()
    assert runs == [5, 5, 2] and len(made._plans) == 1
    assert made._plans[0].launches[0][0] is kernels
    made.step()
    assert runs == [5, 5, 2], "the second step ran the table"


def test_the_optimizer_falls_back_from_kernels_that_have_not(monkeypatch):
    right = kernels.step_
    monkeypatch.setattr(kernels, "step_", lambda params, *a: (right(params, *a), params[0].mul_(1.01)))
    made, params = optimizer()
    with pytest.warns(UserWarning, match="the triton kernels of offset_sgd_ failed"):
        made.step()
    made.step()
    assert not made._plans
    monkeypatch.setenv("LGKERNELS_IMPL", "reference")
    expected, wanted = optimizer()
    expected.step()
    expected.step()
    for mine, theirs in zip(params, wanted):
        torch.testing.assert_close(mine, theirs)


def test_another_policy_drops_what_was_kept(monkeypatch, runs):
    made, _ = optimizer()
    made.step()
    monkeypatch.setenv("LGKERNELS_TRUST", "never")
    dispatch._chosen.cache_clear()
    made.step()
    assert not made._plans and runs == [5, 5, 2]


def test_the_example_has_whole_chunks_pieces_and_tensors_askew():
    arguments = dict(zip(("params", "grads", "momentum_buffers", "offsets"), [[torch.ones(3)]] * 4)) | NUMBERS
    example = TRIALS["offset_sgd_"].example(arguments)
    assert {p.data_ptr() % 16 for p in example["params"]} == {0, 4}
    made = trial.inputs(TRIALS["offset_sgd_"], example, trial._Arena(), 0)
    for name in ("params", "grads", "momentum_buffers", "offsets"):
        assert [t.data_ptr() % 16 for t in made[name]] == [t.data_ptr() % 16 for t in example[name]]
    op.step(reference, *trust.OPS["offset_sgd_"].pack(tuple(made.values())))
    assert all(bool(p.isfinite().all()) for p in made["params"])
