"""Registered ops of the family adapter: shapes, and the call of the chosen backend. With a weight of None: the change
alone."""

from functools import partial

from torch import Tensor

from ...core.ops import define
from .options import Geometry

_define = partial(define, package=__package__)


def _grads_fake(*shapes):
    """Fake of a backward: `shapes` are the positions of the tensors that the gradients are shaped like, -1 for the
    bias, which is shaped like the columns or channels of the incoming gradient."""

    def fake(*arguments):
        g, needs = arguments[0], arguments[-1]
        return tuple(
            g.new_empty(0)
            if not needed or (position >= 0 and arguments[position] is None)
            else g.new_empty(g.shape[1])
            if position < 0
            else g.new_empty(arguments[position].shape)
            for position, needed in zip(shapes, needs)
        )

    return fake


# -- LoRA -----------------------------------------------------------------------------------------------------------


def _lora_fake(x, weight, bias, a, b, scale):
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@_define(backends_of="lora_linear", fake=_lora_fake)
def lora_linear(
    kernels, x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return kernels.lora_linear(x, weight, bias, a, b, scale)


@_define(backends_of="lora_linear", fake=_grads_fake(1, 2, -1, 3, 4))
def lora_linear_backward(
    kernels,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    t: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels.lora_linear_grads(g, x, weight, a, b, t, scale, needs)


# -- LoKr -----------------------------------------------------------------------------------------------------------


def _lokr_fake(x, weight, bias, w1, a, b, scale):
    new, rows, rank = x.new_empty, x.shape[0], b.shape[0]
    return (
        new(rows, w1.shape[0] * (b if a is None else a).shape[0]),
        new(rows, w1.shape[1], rank),
        new(0) if a is None else new(rows, w1.shape[0], rank),
    )


@_define(backends_of="lokr_linear", fake=_lokr_fake)
def lokr_linear(
    kernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w1: Tensor,
    a: Tensor | None,
    b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.lokr_linear(x, weight, bias, w1, a, b, scale)


@_define(backends_of="lokr_linear", fake=_grads_fake(1, 2, -1, 3, 4, 5))
def lokr_linear_backward(
    kernels,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    w1: Tensor,
    a: Tensor | None,
    b: Tensor,
    t: Tensor,
    u: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels.lokr_linear_grads(g, x, weight, w1, a, b, t, u, scale, needs)


def _conv_fake(x, weight, bias, geometry, w1, a, b, scale):
    stride, padding, dilation, groups = geometry
    dimensions = zip(x.shape[2:], padding, dilation, b.shape[2:], stride)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in dimensions]
    new, rows, inner = x.new_empty, x.shape[0], b.shape[0] * size[0] * size[1]
    return (
        new(rows, w1.shape[0] * (b if a is None else a).shape[0], *size),
        new(rows, groups, w1.shape[1], inner),
        new(0) if a is None else new(rows, groups, w1.shape[0] // groups, inner),
    )


@_define(backends_of="lokr_conv2d", fake=_conv_fake)
def lokr_conv2d(
    kernels,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    w1: Tensor,
    a: Tensor | None,
    b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.lokr_conv2d(x, weight, bias, geometry, w1, a, b, scale)


@_define(backends_of="lokr_conv2d", fake=_grads_fake(1, 2, -1, 4, 5, 6))
def lokr_conv2d_backward(
    kernels,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    geometry: Geometry,
    w1: Tensor,
    a: Tensor | None,
    b: Tensor,
    t: Tensor,
    u: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernels.lokr_conv2d_grads(g, x, weight, geometry, w1, a, b, t, u, scale, needs)
