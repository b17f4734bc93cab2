"""The step on the CPU: all tensors in one call of the C++ kernel of `lgkernels._C` (csrc/offset/cpu), float32.

Elements are independent: no number of threads changes a bit.
"""

import torch

from ...core.native import cpu_entries, threads
from .memory import stepper

_C = cpu_entries()
_OFFSET_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def prepare(rows):
    """The kernel's table of addresses."""
    return torch.tensor(
        [
            (
                param.data_ptr(),
                grad.data_ptr(),
                0 if buffer is None else buffer.data_ptr(),
                0 if offset is None else offset.data_ptr(),
                param.numel(),
                0 if offset is None else _OFFSET_DTYPES[offset.dtype],
            )
            for param, grad, buffer, offset in rows
        ],
        dtype=torch.int64,
        device="cpu",
    )


def moved(table, addresses):
    """The table for gradients at other addresses."""
    table.numpy()[:, 1] = addresses
    return table


def run(table, device, options):
    _C.offset_sgd(options.of_kernels(), table.data_ptr(), len(table), threads())


step_ = stepper(prepare, run)
