"""The options of the family direct as values."""

from typing import NamedTuple


class NormOptions(NamedTuple):
    """Of batch normalisation in training."""

    momentum: float
    eps: float


class ActivationOptions(NamedTuple):
    """Leaky ReLU (0: ReLU), and a 2x2 max-pool or none."""

    negative_slope: float
    max_pool: bool


class SignalLaw(NamedTuple):
    """The law of the random matrix (classes, neurons) that projects the output's error."""

    law: str = "uniform"
    law_scale: float = 1.0
    low: float | None = None
