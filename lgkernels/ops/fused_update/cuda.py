"""The fused step on the CUDA C++ kernel of `lgkernels._C` (csrc/fused_update/cuda): `update_` of reference.py.

Launches on the current stream; nothing synchronises.
"""

from ..common.cuda import DTYPES, address, call
from .torch import update_8bit_  # noqa: F401  no kernel of its own yet


def _dense_rows(tensor):
    """The kernel takes any distance between rows, but no gaps within one."""
    return tensor if tensor is None or tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _rows_of(tensor):
    """(address, row stride, dtype code) for the kernel, or None."""
    return None if tensor is None else (address(tensor), tensor.stride(0), DTYPES[tensor.dtype])


def _strided(tensor):
    return address(tensor), DTYPES[tensor.dtype], *tensor.stride()


def update_(weight, first, second, gradient, grad, x, rule):
    theirs = weight, first, second
    own, gradient = [*map(_dense_rows, theirs)], _dense_rows(gradient)  # alive until the launch
    shape = *weight.shape, grad.shape[0]
    call("fused_update", weight.device, rule, shape, *map(_rows_of, (*own, gradient)), _strided(grad), _strided(x))
    for mine, used in zip(theirs, own):
        if used is not mine:
            mine.copy_(used)
