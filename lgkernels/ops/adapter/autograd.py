"""autograd entries of the family adapter: factorised forward and backward; nothing the size of the weight is built. A
weight of None is zero: the change alone."""

import math

import torch

from ...core.autograd import apply, first_order_only
from ...core.ops import autocasts
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def _uniform(x, *tensors):
    """All in x's dtype, or in autocast's: what a matrix product wants."""
    dtype = x.dtype
    if autocasts(x.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None else t.to(dtype) for t in (x, *tensors)]


class _Adapter(torch.autograd.Function):
    """`call`: the op's name, the sizes of a convolution, the scale and impl. `tensors`: x, weight, bias and the
    factors, of which some may be None.

    Two parameters besides ctx, and never two arguments: where nothing learns, Dynamo takes a `forward` that has as
    many parameters, ctx and `*tensors` among them, as it is given arguments for one without ctx.
    """

    @staticmethod
    def forward(ctx, call, *tensors):
        (name, sizes, scale, impl), (x, weight, bias, *factors) = call, tensors
        y, *kept = getattr(_ops, name)(x, weight, bias, *sizes, *factors, scale, impl)
        ctx.save_for_backward(x, weight, *factors, *kept)
        ctx.call, ctx.count = call, len(factors)
        return y

    @staticmethod
    def backward(ctx, g):
        name, sizes, scale, impl = ctx.call
        x, weight, *rest = ctx.saved_tensors
        factors, kept = rest[: ctx.count], rest[ctx.count :]
        needs = list(ctx.needs_input_grad[1:])
        detached = [t if t is None else t.detach() for t in (*factors, *kept)]
        grads = getattr(_ops, f"{name}_backward")(
            g, x.detach(), weight if weight is None else weight.detach(), *sizes, *detached, scale, needs, impl
        )
        return (None, *(first_order_only(name, grad, g, x, *factors) if n else None for grad, n in zip(grads, needs)))


def _linear(name, x, weight, bias, factors, scale, impl):
    x, weight, bias, *factors = _uniform(x, weight, bias, *factors)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is ambiguous where a size is 0
    y = apply(_Adapter, name, (name, (), scale, impl), rows, weight, bias, *factors)
    return y.reshape(*x.shape[:-1], y.shape[1])


def lora_linear(x, weight, bias, a, b, scale, impl):
    return _linear("lora_linear", x, weight, bias, (a, b), scale, impl)


def lokr_linear(x, weight, bias, w1, a, b, scale, impl):
    return _linear("lokr_linear", x, weight, bias, (w1, a, b), scale, impl)


def lokr_conv2d(x, weight, bias, stride, padding, dilation, groups, w1, a, b, scale, impl):
    call = ("lokr_conv2d", (stride, padding, dilation, groups), scale, impl)
    return apply(_Adapter, "lokr_conv2d", call, *_uniform(x, weight, bias, w1, a, b))
