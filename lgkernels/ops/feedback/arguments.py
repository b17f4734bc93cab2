"""What the feedback arguments of the family's public functions mean to its autograd entries."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...core import checks
from ...random import RandomFeedback
from .options import Formula

_SOURCE = "a torch.Tensor or a lgkernels.random.RandomFeedback"


def _source(name: str, value: Any, weight: Tensor) -> tuple[dict, dict]:
    """`(fields of Formula, keywords of the autograd entry)` of a tensor like weight or a RandomFeedback."""
    if isinstance(value, RandomFeedback):
        checks.same_device(weight=weight, **{name: value.verified()})
        return dict(law=value.law, law_scale=value.scale, low=value.low), {"state": value.state}
    checks.tensor(name, value, _SOURCE)
    checks.floating(name, value)
    checks.shape(name, value, weight.shape, "that of weight")
    checks.same_device(weight=weight, **{name: value})
    return {}, {"magnitude": value.detach()}


def alignment(weight: Tensor, feedback: Any) -> tuple[Formula, dict]:
    """`(formula, keywords)` of feedback alignment."""
    law, source = _source("feedback", feedback, weight)
    return Formula(**law), source


def sign_symmetric(
    weight: Tensor, scale: Any, magnitude: Any, sign_zero: Any, packed_signs: Any
) -> tuple[Formula, dict]:
    """`(formula, keywords)` of sign-symmetric feedback."""
    checks.choice("sign_zero", sign_zero, ("zero", "plus"))
    checks.boolean("packed_signs", packed_signs)
    if packed_signs and sign_zero != "plus":
        raise ValueError(
            f"sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got {sign_zero!r}"
        )
    if isinstance(scale, str):
        checks.choice("scale", scale, ("mean_abs",))
    else:
        scale = checks.positive("scale", scale, "a number or 'mean_abs'")
    law, source = ({}, {}) if magnitude is None else _source("magnitude", magnitude, weight)
    return Formula("packed" if packed_signs else "weight", scale=scale, sign_plus=sign_zero == "plus", **law), source


class Scaled(NamedTuple):
    """A RandomFeedback of another scale, with the same state tensor."""

    feedback: RandomFeedback
    scale: float


def projection(
    name: str, value: Tensor, feedback: Any, shape: int | Sequence[int], classes: int | None = None
) -> tuple[tuple[int, ...], int, tuple[Tensor | None, tuple, Tensor | None]]:
    """`(shape, columns, (matrix, law, state))` of a projection of `value`: matrix (C, prod(shape)) or None."""
    shape = checks.sizes("shape", shape, "the sizes of one sample")
    columns = math.prod(shape)
    if isinstance(feedback, (RandomFeedback, Scaled)):
        random, scale = feedback if isinstance(feedback, Scaled) else (feedback, feedback.scale)
        checks.same_device(**{name: value, "feedback": random.verified()})
        return shape, columns, (None, (random.law, scale, random.low), random.state)
    checks.tensor("feedback", feedback, _SOURCE)
    checks.floating("feedback", feedback)
    classes = feedback.shape[0] if classes is None and feedback.dim() else classes
    if tuple(feedback.shape) not in ((classes, *shape), (classes, columns)):
        raise ValueError(
            f"feedback must have shape {(classes, *shape)} or {(classes, columns)} (classes, then shape), "
            f"got {checks.shape_of(feedback)}"
        )
    checks.same_device(**{name: value, "feedback": feedback})
    return shape, columns, (feedback.reshape(classes, columns), ("uniform", 1.0, None), None)
