"""autograd entries of the family adapter: factorised forward and backward; nothing the size of the weight is built."""

import math

import torch

from ...core.autograd import apply, first_order_only
from ...core.ops import autocasts, without_autocast
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def _uniform(x, *tensors):
    """All in x's dtype, or in autocast's: what a matrix product wants."""
    dtype = x.dtype
    if autocasts(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None else t.to(dtype) for t in (x, *tensors)]


class _Adapter(torch.autograd.Function):
    """x, weight, bias and the factors, of which some may be None; `name` of the op, `sizes` of a convolution."""

    @staticmethod
    def forward(ctx, name, sizes, scale, impl, x, weight, bias, *factors):
        y, *kept = getattr(_ops, name)(x, weight, bias, *sizes, *factors, scale, impl)
        ctx.save_for_backward(x, weight, *factors, *kept)
        ctx.meta = name, sizes, scale, impl, len(factors)
        return y

    @staticmethod
    def backward(ctx, g):
        name, sizes, scale, impl, count = ctx.meta
        x, weight, *rest = ctx.saved_tensors
        factors, kept = rest[:count], rest[count:]
        needs = list(ctx.needs_input_grad[4:])
        detached = [t if t is None else t.detach() for t in (*factors, *kept)]
        grads = getattr(_ops, f"{name}_backward")(g, x.detach(), weight.detach(), *sizes, *detached, scale, needs, impl)
        return (
            None,
            None,
            None,
            None,
            *(first_order_only(name, grad, g, x, *factors) if n else None for grad, n in zip(grads, needs)),
        )


def _linear(name, x, weight, bias, factors, scale, impl):
    x, weight, bias, *factors = _uniform(x, weight, bias, *factors)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is ambiguous where a size is 0
    with without_autocast(x.device):
        y = apply(_Adapter, name, name, (), scale, impl, rows, weight, bias, *factors)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_linear(x, weight, bias, a, b, scale, impl):
    return _linear("lora_linear", x, weight, bias, (a, b), scale, impl)


def lokr_linear(x, weight, bias, w1, a, b, scale, impl):
    return _linear("lokr_linear", x, weight, bias, (w1, a, b), scale, impl)


def lokr_conv2d(x, weight, bias, stride, padding, dilation, groups, w1, a, b, scale, impl):
    x, weight, bias, *factors = _uniform(x, weight, bias, w1, a, b)
    with without_autocast(x.device):
        return apply(
            _Adapter,
            "lokr_conv2d",
            "lokr_conv2d",
            (stride, padding, dilation, groups),
            scale,
            impl,
            x,
            weight,
            bias,
            *factors,
        )
