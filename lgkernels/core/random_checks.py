"""Checks of what random matrices are made with."""

from typing import Any

import torch

from . import checks


def check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {checks.got(dtype)}")


def check_state(state: Any) -> None:
    checks.integer("state", state, "seed, stream and step are expected")
    checks.shape("state", state, (3,), "seed, stream, step")
    if state.dtype != torch.int64:
        raise TypeError(f"state must be int64, got {checks.dtype_of(state)}")
