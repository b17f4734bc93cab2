"""A DFA block as one function: convolution, batch norm in training, leaky ReLU, a 2x2 max-pool or none.

What stands for the gradient of its output comes by a `Signal`: the error of the output and the random state, of which
the kernel makes delta where it uses it. The pre-activation z is the only activation that is kept; the backward turns
it into its gradient, in place, and frees it. No other backward can follow.
"""

import os

import torch
from torch.autograd.function import once_differentiable

from ...core import dispatch
from ...core.autograd import apply, settled_dtypes
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


class Signal:
    """`error` (B, classes) and `random` (state, law, law_scale, low), set before the backward; else its argument is
    the gradient, like any function's."""

    error, random = None, (None, "uniform", 1.0, None)


def fused(device, dtype):
    """Whether a kernel is there and wanted (plain torch is slower in one function than in torch's own layers)."""
    wanted = os.environ.get("LGKERNELS_IMPL", "auto") in ("auto", "cpu")
    if not wanted or dtype != torch.float32:
        return False
    return dispatch.explain("direct_forward", device, dtype)[0] not in ("reference", "torch")


class _Block(torch.autograd.Function):
    @staticmethod
    @settled_dtypes
    def forward(ctx, x, weight, bias, gamma, beta, running, signal, geometry, momentum, eps, slope, max_pool):
        z = torch.conv2d(x, weight, bias, *geometry).contiguous()
        out, mean, rstd = _ops.direct_forward(z, gamma, beta, *running, momentum, eps, slope, max_pool, "auto")
        ctx.save_for_backward(x, weight, gamma, beta, mean, rstd)
        ctx.z, ctx.signal, ctx.geometry, ctx.activation = z, signal, geometry, (slope, max_pool)
        return out

    @staticmethod
    @once_differentiable
    @settled_dtypes
    def backward(ctx, grad):
        if ctx.z is None:
            raise RuntimeError("a fused DFA block has one backward: its activation has become a gradient")
        x, weight, gamma, beta, mean, rstd = ctx.saved_tensors
        (z, ctx.z), signal, needs = (ctx.z, None), ctx.signal, ctx.needs_input_grad
        grad_gamma, grad_beta = _ops.direct_backward_(
            z,
            mean,
            rstd,
            gamma,
            beta,
            None if signal.error is not None else grad,
            signal.error,
            *signal.random,
            *ctx.activation,
            "auto",
        )
        stride, padding, dilation, groups = ctx.geometry
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            z, x, weight, None, stride, padding, dilation, False, (0, 0), groups, [*needs[:2], False]
        )
        grad_bias = weight.new_zeros(weight.shape[0]) if needs[2] else None  # the batch norm cancels it
        return grad_x, grad_weight, grad_bias, grad_gamma, grad_beta, *(None,) * 7


def block(x, weight, bias, gamma, beta, running, signal, geometry, momentum, eps, slope, max_pool):
    """x (B, C, H, W) -> (B, O, H', W'); `running` (mean, var) or (None, None), `geometry` conv2d's last arguments."""
    return apply(
        _Block,
        "the fused block of direct feedback",
        x,
        weight,
        bias,
        gamma,
        beta,
        running,
        signal,
        geometry,
        momentum,
        eps,
        slope,
        max_pool,
    )
