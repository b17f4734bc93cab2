"""Calls of the CUDA C++ entry points of `lgkernels._C`: addresses and dtype codes go over, a status comes back."""

import torch

from ...core import native


class _Codes(dict):
    """The kernels' numbers of the dtypes."""

    def __missing__(self, dtype):
        raise TypeError(f"the CUDA kernels take {list(self)}, got {dtype}; float64 runs with impl='reference'")


DTYPES = _Codes({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})


def address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def call(name, device, *args):
    """Entry point `name` on the current stream of `device`; on a CPU that is the tests' executor."""
    entries = native.cuda_entries()
    entry = getattr(entries, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = entry(*args, torch.cuda.current_stream().cuda_stream)
    else:
        status = entry(*args, 0)
    if status:
        raise RuntimeError(f"{name}: CUDA error {status} ({entries.cuda_error_string(status)})")
