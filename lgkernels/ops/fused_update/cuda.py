"""The fused step on the CUDA C++ kernel of `lgkernels._C` (csrc/fused_update/cuda): `update_` of reference.py.

Launches on the current stream; nothing synchronises.
"""

from ..common.cuda import DTYPES, address, call


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


def _coded(codes, absmax):
    return None if codes is None else (address(codes), address(absmax))


def update_8bit_(weight, first, first_max, second, second_max, gradient, grad, x, rule):
    own, gradient = _dense_rows(weight), _dense_rows(gradient)
    states, shape = (_coded(first, first_max), _coded(second, second_max)), (*weight.shape, grad.shape[0])
    matrices = _rows_of(own), *states, _rows_of(gradient)
    call("fused_update_8bit", weight.device, rule, shape, *matrices, _strided(grad), _strided(x))
    if own is not weight:
        weight.copy_(own)
