"""Mixed precision as users write it: autocast over float32 parameters, and a GradScaler around float16."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
import lgkernels.nn as lnn
from tests.lls.blocks import CONV, LINEAR, make, results, unfused
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_accurate, assert_relative

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
@pytest.mark.parametrize(
    "case", [dict(CONV, modulation="matrix", max_pool=True), dict(LINEAR, modulation="vector")], ids=["conv", "linear"]
)
def test_block_under_autocast(impl, case, dtype):
    """As conv2d or linear followed by batch norm: half out, float32 loss, float32 gradients of float32 parameters."""
    block, x, target = make(case, impl)
    plain, exact = copy.deepcopy(block), results(copy.deepcopy(block).double(), x.double(), target, unfused)
    with torch.autocast("cpu", dtype):
        out, loss = block(x, target)
        rival, rival_loss = unfused(plain, x, target)
    loss.backward()
    rival_loss.backward()
    assert out.dtype == rival.dtype == dtype and loss.dtype == torch.float32
    assert_accurate("out", out, rival, exact["out"], 1)
    assert_accurate("loss", loss.detach(), rival_loss.detach(), exact["loss"], 1, rounding=dtype)
    plain = dict(plain.named_parameters())
    for name, parameter in block.named_parameters():
        if name != "layer.bias":  # the pre-activation is rounded to half: its sign may turn where it is near 0
            assert_accurate(name, parameter.grad, plain[name].grad, exact[name], 1, rounding=dtype)
    assert_relative("running_var", block.norm.running_var, exact["running_var"], 0.02)


@HALF
def test_loss_under_autocast(impl, dtype):
    """The op's own arithmetic is not autocast: on a float32 activation nothing changes by a bit."""
    activation, target = randn(4, 3, 4, 4).requires_grad_(), targets(4, 6)
    plain = LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl)
    (grad,) = torch.autograd.grad(plain, activation)
    with torch.autocast("cpu", dtype):
        loss = LF.lls_loss(activation, target, num_classes=6, pool_size=2, impl=impl)
    assert torch.equal(loss, plain) and torch.equal(torch.autograd.grad(loss, activation)[0], grad)


def test_float16_with_a_grad_scaler(impl):
    """A step with finite gradients is taken, unscaled; one with an infinite gradient is skipped, the scale halved."""
    block, x, target = make(dict(CONV, modulation="vector"), impl)
    exact = results(copy.deepcopy(block).double(), x.double(), target, unfused)["layer.weight"]
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = block(x, target)[1]
        scaler.scale(loss).backward()
        before = block.layer.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        return before - block.layer.weight.detach()

    assert_relative("update", step(x), exact, 0.05)
    assert scaler.get_scale() == 2.0**12
    x[0, 0, 0, 0] = 6e4  # overflows in the convolution's float16 output
    assert not step(x * 4).any()
    assert scaler.get_scale() == 2.0**11


@HALF
def test_training_under_autocast_lowers_the_loss(dtype):
    torch.manual_seed(0)
    blocks = [
        lnn.LLSConvBlock(1, 8, 3, padding=1, num_classes=4, pool_size=2, max_pool=True),
        lnn.LLSConvBlock(8, 16, 3, padding=1, num_classes=4, pool_size=2, modulation="matrix"),
        lnn.ClassifierBlock(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * 16, 4))),
    ]
    optimizers = [torch.optim.Adam(b.parameters(), lr=5e-3) for b in blocks]
    x, target = randn(32, 1, 8, 8), targets(32, 4)
    losses = []
    for _ in range(15):
        h = x
        for block, optimizer in zip(blocks, optimizers):
            with torch.autocast("cpu", dtype):
                h, loss = block(h, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]


def test_head_module_under_autocast(impl):
    head = lnn.LLSHead(torch.nn.Conv2d(3, 4, 3), num_classes=5, pool_size=2, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = head(randn(2, 3, 6, 6), targets(2, 5))
    loss.backward()
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (
        head.block.weight.grad.dtype == torch.float32
        and F.normalize(head.block.weight.grad.flatten(), dim=0).isfinite().all()
    )
