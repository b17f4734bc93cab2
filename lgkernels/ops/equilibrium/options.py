"""The options of the family equilibrium as values; flat in the ops' schemas."""

from cmath import exp, pi
from typing import NamedTuple

ACTIVATIONS = ("sigmoid", "dsilu", "hard_sigmoid", "clipped_relu")
HOLOMORPHIC = ("sigmoid", "dsilu")
LOSSES = ("cross_entropy", "mse")
SCHEDULES = ("synchronous", "asynchronous")
ESTIMATORS = ("paper", "symmetric", "exact")
ENERGY_ACTIVATIONS = ("clipped_relu", "hard_sigmoid", "sigmoid")  # those that have an inverse
POOLS = ("none", "avg", "max", "softmax")


class Phases(NamedTuple):
    """The nudges that settle side by side.

    The rows of a state are, of B samples, [phase][B] for the `real_phases` first ones, whose beta has no imaginary
    part, and [phase][Re, Im][B] for the others. beta_real, beta_imag: one number a phase.
    """

    beta_real: list[float]
    beta_imag: list[float]
    real_phases: int

    @property
    def many(self) -> int:
        return len(self.beta_real)

    @property
    def rows(self) -> int:
        """Rows a sample."""
        return 2 * self.many - self.real_phases

    @property
    def betas(self) -> list[complex]:
        return [complex(re, im) for re, im in zip(self.beta_real, self.beta_imag)]


class Settling(NamedTuple):
    """How the states move. tolerance: stop once every sample moves less than this, or is on an orbit of two steps."""

    activation: str
    loss: str
    schedule: str
    steps: int
    tolerance: float | None


class EnergyForm(NamedTuple):
    """An energy net (energy.EnergyNet) without the sizes of its layers. edges: five numbers each, source, target,
    stride, padding and the place of its pool in POOLS."""

    edges: list[int]
    scales: list[float]
    activation: str
    ceiling: float
    linear_output: bool
    loss: str


class EnergyPhases(NamedTuple):
    """A free phase, and one with the net nudged by each of `betas`, which all start where it ends."""

    schedule: str
    free_steps: int
    nudge_steps: int
    betas: list[float]


def one_phase(beta: complex) -> Phases:
    """A phase by itself: complex where its beta is of type complex."""
    return Phases([beta.real], [beta.imag], 0) if isinstance(beta, complex) else Phases([beta], [0.0], 1)


def circle(beta: float, points: int) -> Phases:
    """The phases beta exp(2 pi i k / N) that have to run: with conjugate states at conjugate betas, those of the upper
    half; +beta, then -beta where N is even, are real."""
    angles = [exp(2j * pi * k / points) for k in range(1, (points - 1) // 2 + 1)]
    real = [1.0, -1.0] if points % 2 == 0 else [1.0]
    return Phases(
        [beta * b for b in real] + [beta * a.real for a in angles],
        [0.0] * len(real) + [beta * a.imag for a in angles],
        len(real),
    )


def shares(phases: Phases, points: int) -> list[complex]:
    """What the difference of a phase's activities to the free state's counts in the error, as Re r a + Im r b of a
    share a + b i: by conjugate symmetry a complex phase stands for two of the points."""
    doubled = [1] * phases.real_phases + [2] * (phases.many - phases.real_phases)
    return [many / (points * beta.conjugate()) for many, beta in zip(doubled, phases.betas)]
