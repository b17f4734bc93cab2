"""Matrices by formula, as the kernels of several families take them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...random import VALUES_PER_CALL


class Law(NamedTuple):
    """Random values (`lgkernels.random`): the state tensor (seed, stream, step), the law's name, scale and low end."""

    state: Tensor
    law: str = "uniform"
    scale: float = 1.0
    low: float | None = None


class FeedbackMatrix(NamedTuple):
    """F with its tensors; flat in the ops' schemas.

        F = scale * value                       without weight
        F = scale * |value| * sign(weight)      with weight        value = 1 | magnitude | law(state; row, column)

    weight (N, K), or int32 packed signs; magnitude (N, K); state (seed, stream, step) of `law`.
    """

    weight: Tensor | None = None
    magnitude: Tensor | None = None
    state: Tensor | None = None
    law: str = "uniform"
    law_scale: float = 1.0
    low: float | None = None
    scale: float = 1.0
    sign_plus: bool = False

    @property
    def random(self) -> Law | None:
        """Where the values come from, if it is the law."""
        if self.state is None or self.magnitude is not None:
            return None
        return Law(self.state, self.law, self.law_scale, self.low)


# Of the tensors of a matrix in an op's schema, for `core/ops.define`.
DTYPES = {"weight": (*checks.FLOATING, torch.int32), "state": (torch.int64,)}


def check_law(law: str) -> None:
    if law not in VALUES_PER_CALL:
        checks.choice("law", law, tuple(VALUES_PER_CALL))


def check_state(state: Tensor | None) -> None:
    """Raise unless it is what the kernels read as (seed, stream, step)."""
    if state is not None and (state.shape != (3,) or state.dtype != torch.int64 or not state.is_contiguous()):
        raise ValueError(
            "state must be a contiguous int64 tensor of shape (3,) (seed, stream, step), got "
            f"{str(state.dtype)[6:]} of shape {checks.shape_of(state)}"
        )
