"""The step on the CPU: all tensors in one call of the C++ kernel of `lgkernels._C` (csrc/cpu/offset.h), float32.

It runs over memory, so a parameter's gradient, buffer and offset must lie as the parameter does; what does not is
copied first. Elements are independent: no number of threads changes a bit.
"""
import torch

from ...core.native import native

_C = native()
_OFFSET_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _like(param, value):
    """`value` with the parameter's strides: itself, or a copy."""
    if value.stride() == param.stride() or param.is_contiguous() and value.is_contiguous():
        return value
    return torch.empty_strided(param.shape, param.stride(), dtype=value.dtype).copy_(value)


def _dense(param):
    """Whether the elements fill their memory, in whichever order."""
    return param.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense(param)


def step_(params, grads, momentum_buffers, offsets, lr, momentum, weight_decay, local_scale, offset_scale,
          grad_scale=1.0):
    table, copies = [], []  # copies: (own tensor, what the kernel works on), written back
    buffers = momentum_buffers or [None] * len(params)
    for param, grad, buffer, offset in zip(params, grads, buffers, offsets):
        own = param
        if not _dense(param):
            param = param.contiguous()
            copies.append((own, param))
        if grad.dtype != torch.float32:
            grad = grad.float()
        values = [_like(param, t) if t is not None else None for t in (grad, buffer, offset)]
        if values[1] is not buffer:
            copies.append((buffer, values[1]))
        table.append((param, *values))
    rows = torch.tensor([[*(0 if t is None else t.data_ptr() for t in row), row[0].numel(),
                          0 if row[3] is None else _OFFSET_DTYPES[row[3].dtype]] for row in table])
    _C.offset_sgd(rows.data_ptr(), len(table), lr, momentum, weight_decay, local_scale * grad_scale, offset_scale,
                  torch.get_num_threads())
    for own, used in copies:
        own.copy_(used)
