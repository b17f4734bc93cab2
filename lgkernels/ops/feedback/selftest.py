"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`.

`ORDINARY`: those of `verify`, with the sizes of a linear layer and of a convolution.
"""

import torch

from ..common.selftest import ROWS, Ordinary, arranged, values
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def _formulas(device, dtype, rows=6, columns=40):
    """(weight, magnitude, state, law, law_scale, low, scale, sign_plus) of uSF, frSF by tensor and by formula, FA."""
    weight, magnitude = (values(n, columns, device=device, dtype=dtype)[:rows] for n in (rows, rows + 1))
    state = torch.tensor([11, 3, 2], device=device, dtype=torch.int64)
    return [
        (weight, None, None, "uniform", 1.0, None, 0.25, False),
        (weight, magnitude, None, "uniform", 1.0, None, 0.25, True),
        (weight, None, state, "uniform8", 0.5, 0.0, 1.0, False),
        (None, None, state, "normal", 0.5, None, 1.0, False),
    ]


def product(impl, device, dtype):
    grad = values(3, 6, device=device, dtype=dtype)
    return [_ops.feedback_product(grad, 40, *formula, impl) for formula in _formulas(device, dtype)]


def matrix(impl, device, dtype):
    return [_ops.feedback_matrix(6, 40, *formula, dtype, device, impl) for formula in _formulas(device, dtype)]


def rows(impl, device, dtype):
    index = torch.tensor([4, 0, 4], device=device, dtype=torch.int64)
    state = torch.tensor([11, 3, 2], device=device, dtype=torch.int64)
    return [_ops.feedback_rows(index, 40, state, "uniform", 0.5, None, 1.0, dtype, impl)]


def pack_signs(impl, device, dtype):
    weight = values(6, 40, device=device, dtype=dtype)
    packed = _ops.feedback_pack_signs(weight, impl)
    grad = torch.eye(6, device=device, dtype=dtype)
    return [_ops.feedback_product(grad, 40, packed, None, None, "uniform", 1.0, None, 1.0, True, "reference")]


def fold(impl, device, dtype):
    columns = values(2 * 12, 5 * 6, device=device, dtype=dtype)
    return [_ops.feedback_fold(columns, (2, 5, 5, 9), (2, 3), (3, 4), (2, 2), (1, 0), (1, 1), impl)]


CASES = {
    "feedback_product": product,
    "feedback_matrix": matrix,
    "feedback_rows": rows,
    "feedback_fold": fold,
    "feedback_pack_signs": pack_signs,
}


def _product(rows, columns):
    def run(impl, device, dtype, layout):
        grad = arranged(values(128, rows, device=device, dtype=dtype), layout)
        for formula in _formulas(device, dtype, rows, columns):
            _ops.feedback_product(grad, columns, *formula, impl)

    return Ordinary(ROWS, run)


def _matrix(rows, columns):
    def run(impl, device, dtype, layout):
        for formula in _formulas(device, dtype, rows, columns):
            _ops.feedback_matrix(rows, columns, *formula, dtype, device, impl)

    return Ordinary(ROWS[:1], run)


def _rows(columns):
    def run(impl, device, dtype, layout):
        index, state = torch.arange(128, device=device) % 10, torch.tensor([11, 3, 2], device=device, dtype=torch.int64)
        _ops.feedback_rows(index, columns, state, "uniform", 0.5, None, 1.0, dtype, impl)

    return Ordinary(ROWS[:1], run)


def _pack(rows, columns):
    def run(impl, device, dtype, layout):
        _ops.feedback_pack_signs(values(rows, columns, device=device, dtype=dtype), impl)

    return Ordinary(ROWS[:1], run)


_LAYERS = {"512 x 1024": (512, 1024), "4096 x 4096": (4096, 4096), "256 x 1152": (256, 128 * 9)}


def _each(make):
    return {words: make(*sizes) for words, sizes in _LAYERS.items()}


ORDINARY = {
    "feedback_product": _each(_product),
    "feedback_matrix": _each(_matrix),
    "feedback_rows": {"10 x 16384": _rows(16384)},
    "feedback_pack_signs": _each(_pack),
}
