"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`."""

import torch

from ..common.selftest import values
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def _formulas(device, dtype):
    """(weight, magnitude, state, law, law_scale, low, scale, sign_plus) of uSF, frSF by tensor and by formula, FA."""
    weight, magnitude = (values(n, 40, device=device, dtype=dtype)[:6] for n in (6, 7))
    state = torch.tensor([11, 3, 2], device=device)
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
    index = torch.tensor([4, 0, 4], device=device)
    state = torch.tensor([11, 3, 2], device=device)
    return [_ops.feedback_rows(index, 40, state, "uniform", 0.5, None, 1.0, dtype, impl)]


def pack_signs(impl, device, dtype):
    weight = values(6, 40, device=device, dtype=dtype)
    packed = _ops.feedback_pack_signs(weight, impl)
    grad = torch.eye(6, device=device, dtype=dtype)
    return [_ops.feedback_product(grad, 40, packed, None, None, "uniform", 1.0, None, 1.0, True, "reference")]


def fold(impl, device, dtype):
    columns = values(2 * 12, 5 * 6, device=device, dtype=dtype)
    return [_ops.feedback_fold(columns, (2, 5, 5, 9), (2, 3), (3, 4), (2, 2), (1, 0), (1, 1), impl)]


def update(impl, device, dtype):
    weight, buffer = (values(n, 40, device=device, dtype=dtype)[:6].clone() for n in (6, 7))
    grad, x = values(5, 6, device=device, dtype=dtype), values(5, 40, device=device, dtype=dtype)
    _ops.feedback_update_(weight, buffer, grad, x, 0.1, 0.9, 0.0, 0.01, True, False, 1.0, impl)
    return [weight, buffer]


CASES = {
    "feedback_product": product,
    "feedback_matrix": matrix,
    "feedback_rows": rows,
    "feedback_fold": fold,
    "feedback_pack_signs": pack_signs,
    "feedback_update_": update,
}
