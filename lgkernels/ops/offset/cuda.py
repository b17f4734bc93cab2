"""The step on the CUDA C++ kernel of `lgkernels._C` (csrc/cuda/offset.cu), float32: all tensors in one pass.

Launches on the current stream; nothing synchronises and nothing is copied to the device.
"""
import torch

from ...core import native
from .memory import stepper

_OFFSET_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_OFFSET = -1


def prepare(rows):
    """The kernel's table of addresses, an argument of its launch."""
    return [(param.data_ptr(), grad.data_ptr(), 0 if buffer is None else buffer.data_ptr(),
             0 if offset is None else offset.data_ptr(), param.numel(),
             _NO_OFFSET if offset is None else _OFFSET_DTYPES[offset.dtype])
            for param, grad, buffer, offset in rows]


def run(table, device, *factors):
    entries = native.cuda_entries()
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = entries.offset_sgd(factors, table, torch.cuda.current_stream().cuda_stream)
    else:
        status = entries.offset_sgd(factors, table, 0)
    if status:
        raise RuntimeError(f"offset step: CUDA error {status} ({entries.cuda_error_string(status)})")


step_ = stepper(prepare, run)
