"""Tensors that a kernel walks through side by side: their elements must lie in memory in one and the same order."""
import contextlib

import torch


def _dense(tensor):
    """Whether the elements fill their memory, in whichever order."""
    if tensor.is_contiguous():
        return True
    size = 1
    for stride, count in sorted(zip(tensor.stride(), tensor.shape)):
        if count != 1 and stride != size:
            return False
        size *= count
    return True


def _like(param, value):
    """`value` with the parameter's strides: itself, or a copy."""
    if value is None or param.is_contiguous() and value.is_contiguous() or value.stride() == param.stride():
        return value
    return torch.empty_strided(param.shape, param.stride(), dtype=value.dtype, device=value.device).copy_(value)


@contextlib.contextmanager
def same_layout(params, grads, momentum_buffers, offsets):
    """Rows (param, grad, buffer or None, offset or None): the tensors themselves, or copies in the parameter's order
    (grads in float32, offsets in float32 or bfloat16), of which params and buffers are written back on leaving."""
    rows, copies = [], []
    for param, grad, buffer, offset in zip(params, grads, momentum_buffers or [None] * len(params), offsets):
        own = param
        if not _dense(param):
            param = param.contiguous()
            copies.append((own, param))
        if offset is not None and offset.dtype not in (torch.float32, torch.bfloat16):
            offset = offset.float()
        row = param, *(_like(param, t) for t in (grad.float(), buffer, offset))
        if row[2] is not buffer:
            copies.append((buffer, row[2]))
        rows.append(row)
    yield rows
    for own, used in copies:
        own.copy_(used)
