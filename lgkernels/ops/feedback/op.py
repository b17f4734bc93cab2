"""Registered ops of the family feedback: shapes, checks, and the call of the chosen backend.

The random state goes in as its device tensor (seed, stream, step): no recompilation between layers of different
seeds, and a replayed CUDA graph sees the step of the moment.
"""

from functools import partial

import torch
from torch import Tensor

from ...core import checks, dispatch
from ...core.ops import define
from ..common.matrix import DTYPES, FeedbackMatrix, check_law, check_state

_define = partial(define, package=__package__)


def _check_matrix(rows, columns, f):
    weight, shape = f.weight, (rows, columns)
    if weight is not None:
        if weight.dtype == torch.int32:
            shape = (rows, (columns + 31) // 32)
        if weight.shape != shape:
            checks.shape("weight", weight, shape, "rows and columns of the feedback (words of packed signs)")
    if f.magnitude is not None and f.magnitude.shape != (rows, columns):
        checks.shape("magnitude", f.magnitude, (rows, columns), "rows and columns of the feedback")
    check_state(f.state)
    check_law(f.law)


# -- the product with F ----------------------------------------------------------------------------------------------


def _check_product(grad, columns, f):
    if grad.dim() != 2:
        checks.dims("grad", grad, (2,), "(M, N)")
    _check_matrix(grad.shape[1], columns, f)


def _backend_of_product(impl, grad, columns, f):
    """None where the matrix is given: torch multiplies by it, on any device and in any dtype."""
    given = f.weight is None and f.magnitude is not None
    return None if given else dispatch.backend("feedback_product", impl, grad.device, grad.dtype)


@_define(
    backends_of="feedback_product",
    fake=lambda grad, columns, f: grad.new_empty((grad.shape[0], columns)),
    check=_check_product,
    dtypes=DTYPES,
    choose=_backend_of_product,
)
def feedback_product(kernels, grad: Tensor, columns: int, f: FeedbackMatrix) -> Tensor:
    if kernels is None and f.magnitude is not None:
        product = grad @ f.magnitude.to(grad.dtype)
        return product if f.scale == 1.0 else product.mul_(f.scale)
    return kernels.product(grad, columns, f)


# -- F itself, rows of it, and packed signs --------------------------------------------------------------------------


@_define(
    backends_of="feedback_matrix",
    fake=lambda rows, columns, f, dtype, device: torch.empty((rows, columns), dtype=dtype, device=device),
    check=lambda rows, columns, f, dtype, device: _check_matrix(rows, columns, f),
    dtypes=DTYPES,
    where=lambda rows, columns, f, dtype, device: (device, dtype),
)
def feedback_matrix(
    kernels, rows: int, columns: int, f: FeedbackMatrix, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return kernels.matrix((rows, columns), f, dtype, device)


def _check_rows(index, columns, state, law, *_):
    checks.dims("index", index, (1,), "(B,)")
    if columns < 0:
        raise ValueError(f"columns must be at least 0, got {columns}")
    check_state(state)
    check_law(law)


@_define(
    backends_of="feedback_rows",
    fake=lambda index, columns, *rest: torch.empty((index.shape[0], columns), dtype=rest[-1], device=index.device),
    check=_check_rows,
    dtypes={"index": (torch.int64,), "state": (torch.int64,)},
    where=lambda index, *rest: (index.device, rest[-1]),
)
def feedback_rows(
    kernels,
    index: Tensor,
    columns: int,
    state: Tensor,
    law: str,
    law_scale: float,
    low: float | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return kernels.rows(index, columns, FeedbackMatrix(None, None, state, law, law_scale, low, scale), dtype)


@_define(
    backends_of="feedback_pack_signs",
    fake=lambda weight: weight.new_empty((weight.shape[0], (weight.shape[1] + 31) // 32), dtype=torch.int32),
    check=lambda weight: checks.dims("weight", weight, (2,), "(N, K)"),
)
def feedback_pack_signs(kernels, weight: Tensor) -> Tensor:
    return kernels.pack_signs(weight)


# -- a convolution's columns -----------------------------------------------------------------------------------------


def _check_fold(columns, shape, kernel, positions, stride, padding, dilation):
    for name, sizes, count in (
        ("shape", shape, 4),
        ("kernel", kernel, 2),
        ("positions", positions, 2),
        ("stride", stride, 2),
        ("padding", padding, 2),
        ("dilation", dilation, 2),
    ):
        least = 1 if name in ("kernel", "stride", "dilation") else 0
        if len(sizes) != count or min(sizes) < least:
            raise ValueError(f"{name} must be {count} numbers of at least {least}, got {sizes}")
    rows, width = shape[0] * positions[0] * positions[1], shape[1] * kernel[0] * kernel[1]
    if tuple(columns.shape) != (rows, width):
        checks.shape("columns", columns, (rows, width), "positions, and channels times kernel")
    for size, k, n, s, p, d in zip(shape[2:], kernel, positions, stride, padding, dilation):
        if (size + 2 * p - d * (k - 1) - 1) // s + 1 != n:
            raise ValueError(f"positions must be those of a convolution over {tuple(shape)}, got {tuple(positions)}")


@_define(
    backends_of="feedback_fold",
    fake=lambda columns, shape, *_: columns.new_empty(shape),
    check=_check_fold,
    backends=("reference", "cpu"),
)
def feedback_fold(
    kernels,
    columns: Tensor,
    shape: list[int],
    kernel: list[int],
    positions: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return kernels.fold(columns, shape, kernel, positions, stride, padding, dilation)
