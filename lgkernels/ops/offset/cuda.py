"""The step on the CUDA C++ kernel of `lgkernels._C` (csrc/offset/cuda), float32: all tensors in one pass.

Launches on the current stream; nothing synchronises and nothing is copied to the device.
"""

from ..common.cuda import DTYPES, call
from .memory import stepper

_NO_OFFSET = -1


def prepare(rows):
    """The kernel's table of addresses, an argument of its launch."""
    return [
        (
            param.data_ptr(),
            grad.data_ptr(),
            0 if buffer is None else buffer.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            param.numel(),
            _NO_OFFSET if offset is None else DTYPES[offset.dtype],
        )
        for param, grad, buffer, offset in rows
    ]


def moved(table, addresses):
    """The table for gradients at other addresses."""
    return [(param, grad, *rest) for (param, _, *rest), grad in zip(table, addresses)]


def run(table, device, options):
    call("offset_sgd", device, options.of_kernels(), table)


step_ = stepper(prepare, run)
