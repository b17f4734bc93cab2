"""The sizes of trials: large calls are tried with smaller ones that launch the same, and only where these fit."""

import importlib
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.core import cuts, dispatch, dry, tiles, trial, trust, verdicts
from lgkernels.ops.fused_update.options import UpdateRule
from lgkernels.ops.local_loss import triton as kernels
from tests.integration.test_trust import CPU, OP, REFERENCE, admits, entries, right, stand_in, written  # noqa: F401

HALF = torch.bfloat16
LAW = "normal", 0.5, None, 1.0, False
SGD = UpdateRule("sgd", 0.1)


def empty(*shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


def state():
    return torch.zeros(3, dtype=torch.int64)


def block(x, weight, pool_size):
    channels, geometry = weight.shape[0], [1, 1] if weight.dim() == 4 else []
    norm = (empty(channels) for _ in range(4))
    options = "square", geometry, geometry, 0.1, 1e-5, 0.01, False, 10, pool_size, 0.5, 0.0
    return x, weight, None, *norm, torch.zeros(len(x), dtype=torch.int64), None, *options, True, True, False


def head(x, pool_size):
    options = 10, 0.5, 0.0, True, 1e-12, False, 1.0, "cross_entropy", -100, "mean"
    return x, torch.zeros(len(x), dtype=torch.int64), None, None, "square", pool_size, *options, True


def target(x):
    return torch.zeros(len(x), dtype=torch.int64)


def last(*shape, **kinds):
    return empty(*shape, memory_format=torch.channels_last, **kinds)


# (op, arguments, megabytes of a trial at most)
LARGE = {
    "product, weight": ("feedback_product", (empty(64, 4096), 4096, empty(4096, 4096), None, None, *LAW), 100),
    "product, ragged": ("feedback_product", (empty(64, 5003), 9217, empty(5003, 9217), None, None, *LAW), 200),
    "product, transposed": ("feedback_product", (empty(64, 4096), 4000, empty(4000, 4096).t(), None, None, *LAW), 150),
    "product, packed": (
        "feedback_product",
        (empty(512, 4096, dtype=HALF), 4096, empty(4096, 128).int(), None, None, *LAW[:-1], True),
        100,
    ),
    "product, law": ("feedback_product", (empty(64, 4096, dtype=HALF), 4096, None, None, state(), *LAW), 100),
    "matrix": ("feedback_matrix", (64, 1 << 22, None, None, state(), *LAW, torch.float32, CPU), 10),
    "rows": ("feedback_rows", (torch.zeros(64, dtype=torch.int64), 1 << 22, state(), *LAW[:4], torch.float32), 10),
    "signs": ("feedback_pack_signs", (empty(64, 1 << 20),), 10),
    "update": ("fused_update_", (empty(4096, 4096), None, None, None, empty(128, 4096), empty(128, 4096), *SGD), 10),
    "block": ("lls_block", block(empty(16, 64, 112, 112), empty(64, 64, 3, 3), 2), 150),
    "block, last": ("lls_block", block(last(16, 64, 112, 112, dtype=HALF), last(64, 64, 3, 3, dtype=HALF), 2), 150),
    "block, 512": ("lls_block", block(empty(32, 512, 14, 14), empty(512, 512, 3, 3), 2), 200),
    "block, linear": ("lls_block", block(empty(64, 4096), empty(1024, 4096), 1024), 100),
    "head": ("lls_loss_forward", head(empty(16, 64, 112, 120), 4), 50),
    "head, last": ("lls_loss_forward", head(last(16, 64, 112, 120), 4), 50),
    "head, back": (
        "lls_loss_backward",
        (empty(), empty(64, 1024), empty(64, 10), empty(64, 10), [64, 64, 224, 224], HALF, False, 4, True, True, True),
        100,
    ),
    "cross entropy": (
        "local_cross_entropy",
        (empty(16, 64, 112, 112), empty(10, 64), None, target(empty(16)), 0.0, "mean", True),
        50,
    ),
    "cross entropy, tokens": (
        "local_cross_entropy",
        (empty(16, 128, 512), empty(32000, 512), None, target(empty(16)), 0.0, "mean", True),
        50,
    ),
    "cross entropy, back": (
        "local_cross_entropy_backward",
        (empty(), empty(64, 4096), empty(64, 32000), empty(64, 4096), torch.float32, True, True, True),
        50,
    ),
    "goodness": ("goodness", (empty(32, 64, 112, 112), torch.zeros(32).bool(), 1.0, True, True), 100),
    "goodness, rows": ("goodness", (empty(32, 1 << 20), torch.zeros(32).bool(), 1.0, True, True), 50),
    "goodness, back": ("goodness_backward", (empty(32, 64, 112, 112), empty(32), empty()), 50),
    "similarity": ("similarity", (empty(128, 256, 56, 56), target(empty(128)), 10, True, True), 700),
    "similarity, rows": ("similarity", (empty(256, 1 << 16), target(empty(256)), 10, True, True), 100),
    "similarity, back": ("similarity_backward", (empty(128, 64, 56, 56), empty(128, 64), empty(128, 64), empty()), 50),
    "similarity, rows back": ("similarity_backward", (empty(256, 1 << 16), empty(256, 1 << 16), empty(0), empty()), 50),
}


def modules(op):
    package = op.function.__module__.rpartition(".")[0]
    return [importlib.import_module(f"{package}.{name}") for name in ("triton", "reference")]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", LARGE)
def test_a_large_call_is_tried_with_smaller_sizes_of_the_same_launches(name, arch, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    dispatch.registered_ops()
    op, arguments, megabytes = LARGE[name]
    op = trust.OPS[op]
    triton, reference = modules(op)
    named = dict(zip(op.names, arguments, strict=True))
    found = trust.foreseen(op, "triton", triton, named, CPU)
    small = trust.small(op, triton, named, found, CPU)
    assert found is not None and trust._launches(op, triton, small, arch) == found
    assert 0 < trust._needed(op, reference, small) <= megabytes << 20 < trust._needed(op, reference, named)
    largest = max([int(v) for launch in found for k, v in launch[1:] if k.startswith("BLOCK")], default=1)
    for key, value in named.items():
        if not isinstance(value, torch.Tensor) or key in op.trial.kept:
            continue
        for dim, (before, now) in enumerate(zip(value.shape, small[key].shape)):
            if dim or key not in op.trial.rows:
                assert now == before or (before - now) % 16 == 0 or value.dtype == torch.int32
        assert value.is_contiguous() == small[key].is_contiguous()
        last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        assert not last or small[key].is_contiguous(memory_format=torch.channels_last)
    sizes = [
        (cuts.size_of(named, size.places), cuts.size_of(small, size.places), size) for size in op.trial.sizes(named)
    ]
    for before, now, size in sizes:
        if size.together is not None and size.places[0][1] < size.together and before != now:
            assert now >= 2 * largest and now % largest == before % largest, "whole tiles, and what they leave over"


def test_ordinary_layers_keep_their_sizes(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    dispatch.registered_ops()
    op = trust.OPS["lls_block"]
    triton, _ = modules(op)
    named = dict(zip(op.names, block(empty(128, 64, 16, 16), empty(64, 64, 3, 3), 2)))
    small = trust.small(op, triton, named, trust.foreseen(op, "triton", triton, named, CPU), CPU)
    assert len(small["x"]) < 128 and small["x"].shape[1:] == (64, 16, 16) and small["weight"].shape == (64, 64, 3, 3)


@pytest.mark.parametrize(
    "tensor, dim, strides",
    [
        (empty(8, 64, 48), 1, (32 * 48, 48, 1)),
        (empty(8, 48, 64).transpose(1, 2), 1, (48 * 32, 1, 32)),
        (last(8, 16, 64, 48), 2, (32 * 48 * 16, 1, 48 * 16, 16)),
        (empty(8, 80)[:, :64], 1, (80, 1)),
        (empty(8, 128)[:, ::2], 1, (64, 2)),
        (empty(8, 1).expand(8, 64), 1, (1, 0)),
        (empty(64, 8)[:, 3:4], 0, (8, 1)),
    ],
    ids=["dense", "transposed", "channels last", "gap after rows", "every second", "expanded", "column"],
)
def test_layouts_stay(tensor, dim, strides):
    made = cuts.resized({"x": tensor}, [("x", dim)], 32)["x"]
    assert made.shape == (*tensor.shape[:dim], 32, *tensor.shape[dim + 1 :]) and made.data_ptr() == tensor.data_ptr()
    assert made.stride() == strides or made.shape[1:] == (1,) and made.stride(0) == strides[0]


def test_an_int_that_triton_compiles_for_is_part_of_a_launch():
    kernel = SimpleNamespace(
        params=[SimpleNamespace(name="n", do_not_specialize=False), SimpleNamespace(name="m", do_not_specialize=True)]
    )

    def launch(n, m):
        return dry.launches(lambda: dry.note(kernel, (n, m), {"BLOCK": 8}), 90)

    assert launch(32, 5) == launch(160, 1) != launch(33, 5)
    assert launch(33, 5) == launch(7, 16) != launch(1, 5)


def test_peak_counts_what_is_alive_at_once():
    def run():
        x = torch.empty(1000, device="meta")
        for _ in range(3):
            x = x.view(10, 100).t().reshape(1000) + 1
        return x.add_(1)

    assert 8000 <= dry.peak(run) <= 12000


def test_the_kernels_run_with_the_smaller_sizes_first(monkeypatch):
    monkeypatch.setattr(trust, "_LARGE_TENSORS", 0)
    sizes, kernel = [], kernels.goodness_grad
    monkeypatch.setattr(
        kernels, "goodness_grad", lambda h, *a: (h.is_meta or sizes.append(tuple(h.shape)), kernel(h, *a))[1]
    )
    h = torch.ones(64, 20000, requires_grad=True)
    LF.goodness_loss(h, torch.arange(64) % 2 == 0, threshold=0.3).backward()
    assert {size[1] for size in sizes[:-1]} == {8192 + 20000 % 8192} and sizes[-1] == (64, 20000)
    assert set(entries().values()) == {verdicts.GOOD}


@pytest.mark.parametrize("column", [0, -1], ids=["a whole tile", "what they leave over"])
def test_a_fault_at_either_end_is_found(column, monkeypatch):
    kernel = kernels.goodness_grad

    def wrong(h, *arguments):
        result = kernel(h, *arguments)
        if not h.is_meta:
            result[:, column] += 1
        return result

    monkeypatch.setattr(trust, "_LARGE_TENSORS", 0)
    monkeypatch.setattr(kernels, "goodness_grad", wrong)
    h = torch.ones(64, 20000, requires_grad=True)
    with pytest.warns(UserWarning, match="the triton kernels of goodness_backward failed"):
        LF.goodness_loss(h, torch.arange(64) % 2 == 0, threshold=0.3).backward()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_trial_that_does_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(trust, "_free", lambda device: 1000.0)
    began = []
    with pytest.warns(
        UserWarning, match=r"runs in plain torch in this process: there was no memory .*0 are free\).*next"
    ):
        assert not admits(lambda x: began.append(x) or right(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not admits(right), "each of its calls would ask again"
    assert not began and not entries()
    assert [state for _, state, _ in trust.decided().values()] == [None]
    trust.forget_all()
    monkeypatch.setattr(trust, "_free", lambda device: 1e9)
    assert admits(right), "the next process has more"
    assert written()["verdicts"]


def test_what_a_trial_needs(monkeypatch):
    x = torch.ones(64, 100)
    needed = trust._needed(OP, REFERENCE, {"x": x})
    assert needed == 2 * 2 * x.numel() * 8, "twice the argument and the result in float64"
    assert trust._free(CPU) == math.inf


@pytest.mark.parametrize("error", ["CUDA error 2 (out of memory)", "CUDA out of memory"])
def test_a_kernel_that_gets_no_memory_is_not_condemned(error):
    def full(x):
        raise RuntimeError(error)

    with pytest.warns(UserWarning, match="there was no memory for a trial"):
        assert not admits(full)
    assert not entries() and not written()["verdicts"]


def test_fewer_rows_of_the_same_call():
    arguments = {"x": torch.ones(64, 7), "n": 64, "shape": [64, 3], "none": torch.ones(0), "scale": torch.ones(())}
    given = trial.Trial(rows=("scale", "x", "none"), counts=("n", "shape"), length=lambda a: 1)
    made = trial.with_batch(given, arguments, 8)
    assert trial.batch_of(given, arguments) == 64 and made["n"] == 8 and made["shape"] == [8, 3]
    assert made["x"].shape == (8, 7) and made["none"].shape == (0,) and made["scale"].shape == ()
