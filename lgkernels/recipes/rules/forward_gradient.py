"""Forward gradients of LocalMixer, and what its paper compares them with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn import LocalMixer
from ...training import ForwardGradientTrainer
from ...training.forward_gradient import ESTIMATORS
from .. import variance
from ..options import UsageError, choice, option, positive
from . import Defaults, Measures, Rule, Task

ORDER = 50
MODELS = ("M/1/16", "S/1/1", "M/4/16", "M/7/16", "M/8/16", "L/8/64", "L/32/64")
TAKEN = ("BP", "FA", "DFA")  # names of rules for any network


@dataclass(frozen=True)
class MixerOptions:
    """Of forward gradients and their relatives, which train LocalMixer."""

    draws: int = option(1, "draws of the noise whose mean a step takes, in rules that have noise")
    noise: str = option("normal", "its law: normal, sign (Rademacher)")
    init: str = option("kaiming", "of the weights: kaiming, lecun, constant")
    readout_factor: float = option(0.1, "of the read-out's gradient")

    def __post_init__(self):
        positive(self, "draws")
        choice(self, "noise", ("normal", "sign"))
        choice(self, "init", ("kaiming", "lecun", "constant"))
        if not self.readout_factor >= 0:
            raise UsageError(f"--readout-factor must be at least 0, got {self.readout_factor}")


def build(task: Task) -> list[nn.Module]:
    side = int(task.model.split("/")[1])
    if task.image_size % side:
        raise UsageError(f"--model {task.model} needs images divisible by {side}, got {task.image_size}: --image-size")
    sizes = dict(image_size=task.image_size, in_channels=task.in_channels, num_classes=task.num_classes)
    return [LocalMixer(task.model, init=task.options.init, **sizes)]


def _trainer(estimator: str) -> Callable[..., ForwardGradientTrainer]:
    def trainer(blocks: list[nn.Module], optimizer_factory: Any, task: Task, **options: Any) -> ForwardGradientTrainer:
        if options.pop("grad_scaler", None) is not None:
            raise UsageError("--amp fp16 is not for the rules of LocalMixer: they have no gradient to scale")
        chosen = task.options
        draws = 1 if ESTIMATORS[estimator].perturb == "nothing" else chosen.draws  # the others are compared with those
        given = dict(draws=draws, law=chosen.noise, readout_factor=chosen.readout_factor, impl=task.impl)
        (model,) = blocks
        assert isinstance(model, LocalMixer)
        return ForwardGradientTrainer(model, optimizer_factory, estimator=estimator, seed=task.seed, **given, **options)

    return trainer


def _name(estimator: str) -> str:
    return f"mixer-{estimator.lower()}" if estimator in TAKEN else estimator.lower()


# better than 0.001 for lg-bp and lg-fg-a, by 10 epochs of the embedded Fashion-MNIST
RATES = {"adamw-schedule-free": 0.002}
MEASURES = Measures(
    epoch=variance.of,
    plots={
        "estimator.png": {
            "cosine": "cosine with the exact gradient",
            "variance_ratio": "variance / that of the paper's formula",
        }
    },
)
RULES = tuple(
    Rule(
        _name(estimator),
        build,
        _trainer(estimator),
        MixerOptions,
        models=MODELS,
        defaults=lambda settings: Defaults(rates=RATES),
        measures=MEASURES,
    )
    for estimator in ESTIMATORS
)
