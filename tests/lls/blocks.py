"""Fused blocks and the same blocks in plain torch, differentiated by autograd."""

import copy

import torch
import torch.nn.functional as F

import lgkernels.nn as lnn
from tests.lls.definition import definition
from tests.support import problems
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_accurate

CONV = dict(B=4, cin=3, cout=6, H=8, W=8, kernel=3, padding=1, pool_size=2, num_classes=10)
LINEAR = dict(B=6, features=12, out=16, pool_size=16, num_classes=10)
OPTIONS = (
    "pool_size",
    "num_classes",
    "modulation",
    "reduced_rows",
    "waveform",
    "temperature",
    "label_smoothing",
    "activation",
    "negative_slope",
    "max_pool",
)


def make(case, impl="auto", seed=0):
    """(block, x, target); parameters and running statistics at unit scale, far from their initial values."""
    options = {k: case[k] for k in OPTIONS if k in case}
    torch.manual_seed(seed)
    if "features" in case:
        block = lnn.LLSLinearBlock(case["features"], case["out"], case.get("bias", True), impl=impl, **options)
        x = randn(case["B"], case["features"], seed=seed + 1)
    else:
        block = lnn.LLSConvBlock(
            case["cin"],
            case["cout"],
            case["kernel"],
            case.get("stride", 1),
            case.get("padding", 0),
            case.get("bias", True),
            impl=impl,
            **options,
        )
        x = randn(case["B"], case["cin"], case["H"], case["W"], seed=seed + 1)
    with torch.no_grad():
        for i, parameter in enumerate((block.norm.weight, block.norm.bias, block.norm.running_mean, block.modulation)):
            if parameter is not None:
                parameter.copy_(randn(*parameter.shape, seed=seed + 10 + i))
        block.norm.running_var.copy_(1 + randn(*block.norm.running_var.shape, seed=seed + 20).abs())
    return block, x, targets(case["B"], case["num_classes"], seed=seed + 2)


def unfused(block, x, target):
    """(out, loss) of the block's definition, with the graph of plain torch; updates the running statistics."""
    norm = block.norm
    u = F.batch_norm(
        block.layer(x.detach()),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        True,
        norm.momentum,
        norm.eps,
    )
    a = F.leaky_relu(u, block.negative_slope)
    loss = definition(
        a,
        target,
        block.modulation,
        num_classes=block.num_classes,
        pool_size=block.pool_size,
        waveform=block.waveform,
        temperature=block.temperature,
        label_smoothing=block.label_smoothing,
    )
    return (F.max_pool2d(a, 2) if block.max_pool else a).detach(), loss


def results(block, x, target, function=None, factor=1.0):
    """Everything one training step leaves behind, by name."""
    out, loss = (function or type(block).__call__)(block, x, target)
    (loss * factor).backward()
    found = {
        "out": out,
        "loss": loss.detach(),
        "running_mean": block.norm.running_mean,
        "running_var": block.norm.running_var,
    }
    return {**found, **{name: p.grad for name, p in block.named_parameters() if name != "layer.bias"}}


def check(case, impl, dtype=torch.float32, factor=1.0):
    """Fused against unfused at the same dtype, and both against the unfused block in float64."""
    block, x, target = make(case, impl)
    if case.get("channels_last"):
        block, x = block.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    block, x = block.to(dtype), x.to(dtype)
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    device = problems.DEVICE
    placed = x.to(device)
    block.to(device)
    got = results(block, placed, target.to(device), factor=factor)
    assert torch.equal(placed.cpu(), x), "x was written to"
    same = results(plain, x, target, unfused, factor)
    truth = results(exact, x.double(), target, unfused, factor)
    length = x[0].numel() * 4 + got["out"].numel() // got["out"].shape[1]
    for name, value in truth.items():
        assert_accurate(name, got[name], same[name], value, length)
    bias = block.layer.bias
    assert bias is None or not bias.grad.any(), "the bias before a batch norm has no gradient"
    return block, got
