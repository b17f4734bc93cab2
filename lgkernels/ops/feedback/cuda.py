"""Feedback matrices on the CUDA C++ kernels of `lgkernels._C` (csrc/feedback/cuda): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""

import torch

from ...core import native
from ..common.cuda import DTYPES, address, call
from ..common.matrix import FeedbackMatrix

_PACKED_SIGNS = 3

# Up to this many rows of grad the product makes F in registers, beyond that it writes F and calls the library. The
# half dtypes change over earlier: there the library has matrix instructions. Not measured: by the multiply-adds that
# hide behind the reads of W (4096 x 9216) on an H100. A matrix of few rows (DFA: classes) costs little to make again.
_IN_REGISTERS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}
_FEW_ROWS = 32


def _dense_rows(tensor):
    """The kernels take any distance between rows, but no gaps within one."""
    return tensor if tensor is None or tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _rows_of(tensor):
    """(address, row stride, dtype code) for the kernels, or None."""
    if tensor is None:
        return None
    return address(tensor), tensor.stride(0), _PACKED_SIGNS if tensor.dtype == torch.int32 else DTYPES[tensor.dtype]


def _strided(tensor):
    return address(tensor), DTYPES[tensor.dtype], *tensor.stride()


def _formula(shape, f):
    """The kernels' description of F, and the tensors that must outlive the launch."""
    weight, magnitude, random = _dense_rows(f.weight), _dense_rows(f.magnitude), f.random
    state, law, law_scale, low = random or (None, "uniform", 1.0, None)
    formula = (*shape, _rows_of(weight), _rows_of(magnitude), address(state), law, law_scale, low, f.scale, f.sign_plus)
    return formula, (weight, magnitude, state)


def matrix(shape, f, dtype, device):
    formula, _keep = _formula(shape, f)
    out = torch.empty(shape, dtype=dtype, device=device)
    call("feedback_matrix", out.device, formula, 0, address(out), DTYPES[dtype])
    return out


def rows(index, columns, f, dtype):
    index = index.contiguous()
    formula, _keep = _formula((index.shape[0], columns), f)
    out = torch.empty((index.shape[0], columns), dtype=dtype, device=index.device)
    call("feedback_matrix", out.device, formula, address(index), address(out), DTYPES[dtype])
    return out


def product(grad, columns, f):
    (m, n), device = grad.shape, grad.device
    if n == 0:
        return torch.zeros((m, columns), dtype=grad.dtype, device=device)
    if m > _IN_REGISTERS[grad.dtype] and n > _FEW_ROWS:
        return grad @ matrix((n, columns), f, grad.dtype, device)
    return product_in_registers(grad, columns, f)


def product_in_registers(grad, columns, f):
    """`product` for few rows of grad (any number, but never 0 columns of it)."""
    (m, n), device = grad.shape, grad.device
    formula, _keep = _formula((n, columns), f)
    out = torch.empty((m, columns), dtype=grad.dtype, device=device)
    splits = native.cuda_entries().feedback_product_splits(formula, m)
    scratch = torch.empty((splits, m, columns), dtype=torch.float32, device=device) if splits > 1 else None
    call("feedback_product", device, formula, _strided(grad), m, address(out), DTYPES[grad.dtype], address(scratch))
    return out


def pack_signs(weight):
    formula, _keep = _formula(weight.shape, FeedbackMatrix(weight))
    out = torch.empty((weight.shape[0], -(-weight.shape[1] // 32)), dtype=torch.int32, device=weight.device)
    call("feedback_pack_signs", out.device, formula, address(out))
    return out
