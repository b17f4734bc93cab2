"""Registered ops of the family adapter: schema, shapes (fake), and the call of the chosen backend."""

import torch

from ...core import dispatch

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")
OPS = ("lora_linear", "lokr_linear", "lokr_conv2d")

for _name in OPS:
    dispatch.register(_name, reference="lgkernels.ops.adapter.reference")


def _op(name, schema, function, fake):
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgkernels::{name}", fake, lib=LIBRARY)


def _call(name, suffix=""):
    """The backend's function, chosen by the first tensor; the last argument is `impl`."""

    def function(*arguments):
        x, impl = arguments[0], arguments[-1]
        return getattr(dispatch.backend(name, impl, x.device, x.dtype), name + suffix)(*arguments[:-1])

    return function


def _grads_fake(*shapes):
    """Fake of a backward: `shapes` are the positions of the tensors that the gradients are shaped like, -1 for the
    bias, which is shaped like the columns or channels of the incoming gradient."""

    def fake(*arguments):
        g, needs = arguments[0], arguments[-2]
        return tuple(
            g.new_empty(0)
            if not needed or (position >= 0 and arguments[position] is None)
            else g.new_empty(g.shape[1])
            if position < 0
            else g.new_empty(arguments[position].shape)
            for position, needed in zip(shapes, needs)
        )

    return fake


def _lora_fake(x, weight, bias, a, b, scale, impl):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _lokr_fake(x, weight, bias, w1, a, b, scale, impl):
    new, rows, rank = x.new_empty, x.shape[0], b.shape[0]
    return (
        new(rows, weight.shape[0]),
        new(rows, w1.shape[1], rank),
        new(0) if a is None else new(rows, w1.shape[0], rank),
    )


def _conv_fake(x, weight, bias, stride, padding, dilation, groups, w1, a, b, scale, impl):
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)
    ]
    new, rows, inner = x.new_empty, x.shape[0], b.shape[0] * size[0] * size[1]
    return (
        new(rows, weight.shape[0], *size),
        new(rows, groups, w1.shape[1], inner),
        new(0) if a is None else new(rows, groups, w1.shape[0] // groups, inner),
    )


_op(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, str impl) -> (Tensor, Tensor)",
    _call("lora_linear"),
    _lora_fake,
)
_op(
    "lora_linear_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor t, float scale, "
    "bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _call("lora_linear", "_grads"),
    _grads_fake(1, 2, -1, 3, 4),
)
_op(
    "lokr_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor w1, Tensor? a, Tensor b, float scale, str impl) -> "
    "(Tensor, Tensor, Tensor)",
    _call("lokr_linear"),
    _lokr_fake,
)
_op(
    "lokr_linear_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor w1, Tensor? a, Tensor b, Tensor t, Tensor u, "
    "float scale, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _call("lokr_linear", "_grads"),
    _grads_fake(1, 2, -1, 3, 4, 5),
)
_op(
    "lokr_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "Tensor w1, Tensor? a, Tensor b, float scale, str impl) -> (Tensor, Tensor, Tensor)",
    _call("lokr_conv2d"),
    _conv_fake,
)
_op(
    "lokr_conv2d_backward",
    "(Tensor g, Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, "
    "int groups, Tensor w1, Tensor? a, Tensor b, Tensor t, Tensor u, float scale, bool[] needs, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _call("lokr_conv2d", "_grads"),
    _grads_fake(1, 2, -1, 7, 8, 9),
)
