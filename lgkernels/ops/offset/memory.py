"""Tensors that a kernel walks through side by side: their elements must lie in memory in one and the same order."""

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


def same_layout(params, grads, momentum_buffers, offsets):
    """`(rows, copied, copies)`: rows (param, grad, buffer or None, offset or None), the tensors themselves, or copies
    in the parameter's order (grads in float32, offsets in float32 or bfloat16); whether there are any copies; and
    (tensor, its copy) of those that the step must write back."""
    rows, copied, copies = [], False, []
    for tensors in zip(params, grads, momentum_buffers or [None] * len(params), offsets):
        param, grad, buffer, offset = tensors
        if not _dense(param):
            param = param.contiguous()
            copies.append((tensors[0], param))
        if offset is not None and offset.dtype not in (torch.float32, torch.bfloat16):
            offset = offset.float()
        row = param, *(_like(param, t) for t in (grad.float(), buffer, offset))
        if row[2] is not buffer:
            copies.append((buffer, row[2]))
        copied = copied or any(a is not b for a, b in zip(row, tensors))
        rows.append(row)
    return rows, copied, copies


def stepper(prepare, run):
    """`step_` of a backend, from its two parts: `prepare(rows)` and `run(what that made, device, options)`.

    Returns what `prepare` made if it can be run again as long as the tensors' memory stays the same, else None.
    """

    def step_(params, grads, momentum_buffers, offsets, options):
        if not params:
            return None
        rows, copied, copies = same_layout(params, grads, momentum_buffers if options.momentum else [], offsets)
        table = prepare(rows)
        run(table, params[0].device, options)
        for own, used in copies:
            own.copy_(used)
        return None if copied else table

    return step_
