"""Trials where summands cancel: what is left of them is rounding, of the size of what was added up."""

import importlib
import types

import pytest
import torch

from lgkernels.core import dispatch, trial, trust

EPS = torch.finfo(torch.float32).eps


def block(channels, pool_size, classes, linear=False):
    space, kernel, geometry = ((), (), []) if linear else ((8, 8), (3, 3), [1, 1])
    vector = torch.zeros(channels)
    return [
        *(torch.zeros(16, 3, *space), torch.zeros(channels, 3, *kernel), None, vector, vector, vector, vector),
        *(torch.zeros(16, dtype=torch.int64), None, "square", geometry, geometry, 0.1, 1e-5, 0.01, False),
        *(classes, pool_size, 0.5, 0.0, True, True, False),
    ]


def loss(*shape, pool_size, classes, smoothing=0.0):
    head = pool_size, classes, 0.5, smoothing, True, 1e-12, False, 1.0, "cross_entropy", -100, "mean"
    return [torch.zeros(shape), torch.zeros(16, dtype=torch.int64), None, None, "square", *head, True]


def cross_entropy(*shape, classes, smoothing=0.0):
    target = torch.zeros(shape[0], dtype=torch.int64)
    return [torch.zeros(shape), torch.zeros(classes, shape[1]), None, target, smoothing, "mean", True]


def similarity(*shape):
    return [torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64), 10, True, True]


CASES = {
    "one channel, one bin": ("lls_block", "head", block(1, 1, 10)),
    "one channel": ("lls_block", "head", block(1, 2, 10)),
    "one class": ("lls_block", "head", block(4, 2, 1)),
    "one output": ("lls_block", "head", block(1, 1, 10, linear=True)),
    "one latent": ("lls_loss_forward", "head", loss(16, 8, pool_size=1, classes=10)),
    "one latent, one class": ("lls_loss_forward", "head", loss(16, 1, 4, 4, pool_size=1, classes=1, smoothing=0.1)),
    "cross entropy of one class": ("local_cross_entropy", "local_cross_entropy", cross_entropy(16, 5, 4, 4, classes=1)),
    "smoothed": ("local_cross_entropy", "local_cross_entropy", cross_entropy(16, 5, classes=1, smoothing=0.1)),
    "two features": ("similarity", "similarity", similarity(16, 2)),
    "deviations": ("similarity", "similarity", similarity(16, 5, 4, 4)),
}


def check(name, op, function, arguments, ulps, rows, magnitudes=True):
    """A trial of kernels that are the reference, with so many units of rounding of the summands in each result."""
    dispatch.registered_ops()
    op = trust.OPS[op]
    package = op.function.__module__.rpartition(".")[0]
    reference, sizes = (importlib.import_module(f"{package}.{module}") for module in ("reference", "magnitudes"))

    def rounded(*arguments):
        def signs(result):
            return torch.arange(result.numel()).reshape(result.shape) % 3 - 1

        pairs = zip(getattr(reference, function)(*arguments), getattr(sizes, function)(*arguments))
        return tuple(result + ulps * EPS * size * signs(result) for result, size in pairs)

    kernels = types.SimpleNamespace(**{**vars(reference), function: rounded})
    given = op.trial if magnitudes else op.trial._replace(magnitudes=None)
    named = trial.with_batch(given, dict(zip(op.names, arguments, strict=True)), rows)
    trial.check(op.function, op.pack, kernels, reference, named, given, name)


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("name", CASES)
def test_rounding_of_the_summands_is_no_fault(name, rows):
    check(name, *CASES[name], ulps=4, rows=rows)


@pytest.mark.parametrize("name", CASES)
def test_more_than_rounding_is(name):
    with pytest.raises(trial.Fault, match="error"):
        check(name, *CASES[name], ulps=1000, rows=8)


@pytest.mark.parametrize("name", ["one latent", "cross entropy of one class"])
def test_the_truth_has_no_scale_there(name):
    with pytest.raises(trial.Fault, match="error"):
        check(name, *CASES[name], ulps=4, rows=8, magnitudes=False)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_block_of_few_channels_passes_with_any_values(backend, seed):
    """Of about a hundred trials one failed where the scale was that of the truth alone."""
    dispatch.registered_ops()
    if dispatch.unavailable("lls_block", backend, torch.device("cpu"), torch.float32):
        pytest.skip(f"the {backend} backend is not there")
    op = trust.OPS["lls_block"]
    reference, kernels = (importlib.import_module(f"lgkernels.ops.lls.{module}") for module in ("reference", backend))
    for arguments in (block(2, 1, 10), block(1, 2, 10)):
        named = trial.with_batch(op.trial, dict(zip(op.names, arguments)), 8)
        trial.check(op.function, op.pack, kernels, reference, named, op.trial, f"s{seed}")
