"""Feedback on the CPU: the functions of `reference.py` over the C++ kernels of `lgkernels._C` (csrc/feedback/cpu).

Rows of a matrix are taken with any stride, columns dense (anything else is copied once). Arithmetic is float32, sums
in an order that no number of threads changes, unless the library's product is faster here.
"""

import math

import torch

from ...core import measured
from ...core.native import cpu_entries, threads
from ..common.cpu import code, dense_rows, feedback, floats
from ..common.cpu import matrix as describe
from ..common.matrix import FeedbackMatrix

_C = cpu_entries()

# Four signs at once are one look-up: a product with signs alone costs less than to write them out for the library.
SIGNS_BY_LOOK_UP = _C is not None and _C.cpu_level() == "avx512"

_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # the library then has matrix instructions for bf16


def _library_is_faster(batch, rows, columns, dtype, signs_alone):
    """Whether F written out in `dtype` and the library's product beat the kernel that makes F in the cache.

    Measured on one Zen 4 core with MKL and oneDNN, ratio of the kernel's time to theirs. AVX-512, float32: signs 0.2
    to 0.5 and other F 0.4 to 0.9, at any batch; AVX2: 0.2 to 0.9. bfloat16: signs 0.2 to 1; other F 0.6 at batch 8,
    1.1 to 1.6 at 64 and 128, 2 to 2.6 from 512 on. float16: below 0.05.
    Baseline instructions: 0.7 at 8, 1.4 to 1.8 from 32. Of large batches in float32 each processor is asked, except
    where signs alone are looked up: MKL's product is about twice as fast on an Intel Xeon as on that Zen 4.
    """
    if _C.cpu_level() == "default":
        return batch >= 32 and dtype != torch.float16
    if batch < 64 or (signs_alone and (SIGNS_BY_LOOK_UP or dtype == torch.bfloat16)):
        return False
    if dtype == torch.bfloat16:
        return _BF16
    if dtype != torch.float32 or batch * rows * columns < _LARGE:
        return False
    together = min(512, 2 ** (batch.bit_length() - 1))
    return measured.other_is_faster(f"feedback_product of {together} rows", lambda: _ways(together))


_LARGE = 2**27  # multiply-adds; a smaller product is not worth the time that asking takes
_PANEL = 256, 2048  # rows and columns of F that are written at a time, for a product to find them in the cache


def _ways(batch):
    """A product with a formula's F by our kernel, and by the library's product."""
    rows, columns = 512, 2048
    state = torch.zeros(3, dtype=torch.int64, device="cpu")
    f = FeedbackMatrix(torch.ones(rows, columns, dtype=torch.float32, device="cpu"), state=state, law="uniform8")
    grad = torch.ones(batch, rows, dtype=torch.float32, device="cpu")
    return lambda: _by_kernel(grad, columns, f), lambda: _by_library(grad, columns, f)


def _dense(f):
    """F whose matrices have dense rows."""
    return f._replace(weight=dense_rows(f.weight), magnitude=dense_rows(f.magnitude))


def matrix(shape, f, dtype, device):
    f = _dense(f)
    out = torch.empty(shape, dtype=dtype, device=device)
    _C.feedback_matrix(feedback(shape, f), 0, 0, out.data_ptr(), code(dtype), threads())
    return out


def product(grad, columns, f):
    batch, rows = grad.shape
    if _library_is_faster(batch, rows, columns, grad.dtype, f.magnitude is None and f.state is None):
        return _by_library(grad, columns, f)
    return _by_kernel(grad, columns, f)


def _by_kernel(grad, columns, f):
    batch, rows = grad.shape
    grad, f = dense_rows(grad), _dense(f)
    out = torch.empty(batch, columns, dtype=grad.dtype, device=grad.device)
    _C.feedback_product(
        feedback((rows, columns), f), describe(grad), batch, out.data_ptr(), code(grad.dtype), threads()
    )
    return out


def _by_library(grad, columns, f):
    """A panel of F at a time; in 16 bits all of F, as a sum of parts' products would be rounded at each."""
    batch, rows = grad.shape
    if grad.dtype != torch.float32:
        return grad @ matrix((rows, columns), f, grad.dtype, grad.device)
    f, out = _dense(f), floats(batch, columns)
    if not rows:
        return out.zero_()
    memory = floats(min(rows, _PANEL[0]) * min(columns, _PANEL[1]))
    for column in range(0, columns, _PANEL[1]):
        wide = min(_PANEL[1], columns - column)
        target = out[:, column : column + wide]
        for row in range(0, rows, _PANEL[0]):
            deep = min(_PANEL[0], rows - row)
            panel = memory[: deep * wide].view(deep, wide)
            panel_of_f = feedback((deep, wide), f)
            _C.feedback_matrix(panel_of_f, row, column, panel.data_ptr(), code(torch.float32), threads())
            left = grad[:, row : row + deep]
            target.addmm_(left, panel, beta=1 if row else 0)
    return out


def rows(index, columns, f, dtype):
    index = index.contiguous()
    out = torch.empty(index.shape[0], columns, dtype=dtype, device=index.device)
    f = feedback((0, columns), f)
    _C.feedback_rows(f, index.data_ptr(), index.shape[0], out.data_ptr(), code(dtype), threads())
    return out


def fold(columns, shape, kernel, positions, stride, padding, dilation):
    wanted = shape[0] * math.prod(positions), shape[1] * math.prod(kernel)
    if columns.shape != wanted:
        raise ValueError(f"columns must be {wanted}, got {tuple(columns.shape)}")
    own, out = columns.float().contiguous(), columns.new_empty(shape, dtype=torch.float32)
    windows = (*shape, kernel, positions, stride, padding, dilation)
    _C.feedback_fold(windows, own.data_ptr(), out.data_ptr(), threads())
    return out.to(columns.dtype)


def pack_signs(weight):
    weight, (rows, columns) = dense_rows(weight), weight.shape
    out = torch.empty(rows, (columns + 31) // 32, dtype=torch.int32, device=weight.device)
    _C.feedback_pack_signs(describe(weight), rows, columns, out.data_ptr(), threads())
    return out
