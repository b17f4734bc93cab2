"""Equilibrium propagation: holomorphic, in continuous time, of energies, and the gradients that it is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import jacobian_symmetry, recurrent_backprop_error, weight_angle
from ...nn import EquilibriumConvNet, EquilibriumMLP, HopfieldNet
from ...training import EquilibriumTrainer
from ...training.hopfield import gradients_through_time
from ..options import UsageError, choice, option, positive
from . import Defaults, Measures, Rule, Task

ORDER = 55
MODELS = ("eq-mlp", "eq-loop", "eq-conv")
ENERGY_MODELS = ("hopfield-mlp", "hopfield-conv")
METHODS = {"hep": "holomorphic", "continuous-hep": "continuous", "eq-rbp": "recurrent_backprop"}
ENERGY_METHODS = {"ep": "holomorphic", "ep-bptt": "recurrent_backprop"}
RATES = {"sgd": 0.01}
BOUNDS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the histogram of residuals


@dataclass(frozen=True)
class SettlingOptions:
    """Of all nets that settle."""

    nudge: float = option(0.5, "size of the nudge, beta; of hep the circle's radius")
    nudge_steps: int = option(20, "steps of a nudged phase")
    free_steps: int | None = option(None, "steps of the free phase (default: 150, of ep 60)")
    schedule: str | None = option(
        None, "synchronous, or asynchronous: even and odd layers in turn (default: synchronous, of ep asynchronous)"
    )
    unsettled: str = option("skip", "a batch whose nudges do not settle: skip, leave_out, raise")

    def __post_init__(self):
        positive(self, "nudge_steps", "nudge")
        if self.free_steps is not None:
            positive(self, "free_steps")
        if self.schedule is not None:
            choice(self, "schedule", ("synchronous", "asynchronous"))
        choice(self, "unsettled", ("skip", "leave_out", "raise"))


@dataclass(frozen=True)
class EquilibriumOptions(SettlingOptions):
    """Of nets with feedback weights of their own."""

    nudge_points: int = option(2, "points N of the circle of nudges; 0: the derivative at no nudge")
    plateaus: int = option(20, "of continuous-hep, each of --nudge-steps")
    start_angle: float = option(0.0, "between forward and feedback weights at the start, in degrees; 0: symmetric")
    homeostasis: float = option(0.0, "coefficient of the homeostatic loss")
    homeostasis_estimator: str = option("paper", "paper, symmetric, exact")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "plateaus")
        choice(self, "homeostasis_estimator", ("paper", "symmetric", "exact"))
        if not 0 <= self.nudge_points <= 1024:
            raise UsageError(f"--nudge-points must be 0 to 1024, got {self.nudge_points}")
        if not 0 <= self.start_angle <= 180:
            raise UsageError(f"--start-angle must lie in [0, 180], got {self.start_angle}")
        if not self.homeostasis >= 0:
            raise UsageError(f"--homeostasis must be at least 0, got {self.homeostasis}")


@dataclass(frozen=True)
class EnergyOptions(SettlingOptions):
    """Of nets with an energy."""

    variant: str = option("centered", "nudges 0 and beta: positive; -beta and 0: negative; -beta and beta: centered")
    feedback: float = option(1.0, "what comes down an edge is multiplied with it")
    state_activation: str = option("clipped_relu", "clipped_relu, hard_sigmoid, sigmoid")
    readout: str = option("mse", "mse: of output units that settle; cross_entropy: of a readout above the last layer")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "feedback")
        choice(self, "variant", ("positive", "negative", "centered"))
        choice(self, "state_activation", ("clipped_relu", "hard_sigmoid", "sigmoid"))
        choice(self, "readout", ("mse", "cross_entropy"))


def build(task: Task) -> list[nn.Module]:
    chosen = task.options
    dynamics = dict(
        steps=150 if chosen.free_steps is None else chosen.free_steps,
        schedule=chosen.schedule or "synchronous",
        angle=chosen.start_angle,
        num_classes=task.num_classes,
    )
    if task.model == "eq-conv":
        side = task.image_size
        if not 30 <= side < 46:
            raise UsageError(f"--model eq-conv needs images of 30 to 45 pixels, got {side}: --image-size 32")
        return [EquilibriumConvNet(task.in_channels, impl=task.impl, **dynamics)]
    features, topology = task.in_channels * task.image_size**2, "loop" if task.model == "eq-loop" else "chain"
    return [EquilibriumMLP(features, topology=topology, impl=task.impl, **dynamics)]


def build_energy(task: Task) -> list[nn.Module]:
    chosen, side = task.options, task.image_size
    layers: list[Any] = [256, 256]
    if task.model == "hopfield-conv":
        if side < 16:
            raise UsageError(f"--model hopfield-conv needs images of at least 16 pixels, got {side}")
        layers = [dict(channels=n, kernel_size=5, pool="max") for n in (32, 64)]
        if side == 32:
            layers = HopfieldNet.conv32(task.num_classes)[:-1]
    net = HopfieldNet(
        (task.in_channels, side, side) if task.model == "hopfield-conv" else (task.in_channels * side**2,),
        layers if chosen.readout == "cross_entropy" else [*layers, task.num_classes],
        num_classes=task.num_classes,
        activation=chosen.state_activation,
        loss=chosen.readout,
        linear_output=chosen.readout == "mse",
        feedback=chosen.feedback,
        schedule=chosen.schedule or "asynchronous",
        steps=60 if chosen.free_steps is None else chosen.free_steps,
        impl=task.impl,
    )
    return [net]


def _trainer(method: str) -> Callable[..., EquilibriumTrainer]:
    def trainer(blocks: list[nn.Module], optimizer_factory: Any, task: Task, **options: Any) -> EquilibriumTrainer:
        if options.pop("grad_scaler", None) is not None:
            raise UsageError("--amp fp16 is not for nets that settle: they have no gradient to scale")
        chosen = task.options
        own: dict[str, Any] = dict(unsettled=chosen.unsettled, seed=task.seed, **options)
        own |= dict(method=method, beta=chosen.nudge, nudge_steps=chosen.nudge_steps)
        (model,) = blocks
        if isinstance(model, HopfieldNet):
            return EquilibriumTrainer(model, optimizer_factory, variant=chosen.variant, **own)
        if method == "continuous" and not chosen.nudge_points:
            raise UsageError("--nudge-points must be at least 1 for continuous-hep, got 0")
        assert isinstance(model, (EquilibriumMLP, EquilibriumConvNet))
        return EquilibriumTrainer(
            model,
            optimizer_factory,
            points=chosen.nudge_points,
            plateaus=chosen.plateaus,
            homeostasis=chosen.homeostasis,
            estimator=chosen.homeostasis_estimator,
            **own,
        )

    return trainer


# -- measures ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(run: Any) -> dict[str, Any]:
    """Of an epoch: the weights' angle, the Jacobian's symmetry, the cosine of e and the true error by layer, how many
    samples of a batch have settled to which residual, and the batches that were reported so far."""
    trainer = run.trainer
    assert isinstance(trainer, EquilibriumTrainer)
    model = trainer.model
    assert not isinstance(model, HopfieldNet)
    x, target = run.batch_at(torch.arange(run.settings.batch_size), 0)
    state, e, _ = trainer.error(x, target)
    x, weights = model.input_of(x), model.named_weights()
    steps = max(trainer.nudge_steps, 100)
    words = dict(activation=model.activation, loss=model.loss)
    delta = recurrent_backprop_error(weights, x, target, state, steps=steps, **words)
    symmetry = jacobian_symmetry(weights, model.activities(state), noise=trainer.noise).mean()
    record: dict[str, Any] = {
        "angle": {"all pairs": _number(weight_angle(weights))},
        "symmetry": {"Jacobian": _number(symmetry)},
        "cosine": {layer: _cosine(e[layer], delta[layer]) for layer in e},
        "reported_batches": trainer.reported,
    }
    if trainer.method != "continuous":
        record["settled"] = _shares(trainer)
    return record


def measured_energy(run: Any) -> dict[str, Any]:
    """Of an epoch: the cosine of each weight's gradient with the one through time, how many samples of a batch have
    settled to which residual, and the batches that were reported so far."""
    trainer = run.trainer
    assert isinstance(trainer, EquilibriumTrainer) and isinstance(trainer.model, HopfieldNet)
    x, target = run.batch_at(torch.arange(run.settings.batch_size), 0)
    _, gradients, _ = trainer.gradients(x, target)
    free = trainer.model.settle(x)
    true = gradients_through_time(trainer.model, x, target, free, max(trainer.nudge_steps, 100))
    return {
        "cosine": {
            key.removesuffix("/kernel"): _cosine(gradients[key].flatten()[None], true[key].flatten()[None])
            for key in true
            if key.endswith("kernel")
        },
        "settled": _shares(trainer),
        "reported_batches": trainer.reported,
    }


def _shares(trainer: EquilibriumTrainer) -> dict[str, float]:
    residual = trainer.residual
    assert residual is not None
    return {f"<= {bound:g}": (residual <= bound).double().mean().item() for bound in BOUNDS}


def _cosine(e: Tensor, delta: Tensor) -> float | None:
    return _number(torch.nn.functional.cosine_similarity(e.flatten(1), delta.flatten(1), dim=1).mean())


def _number(value: Tensor) -> float | None:
    return value.item() if math.isfinite(value.item()) else None


MEASURES = Measures(
    epoch=measured,
    plots={
        "equilibrium.png": {
            "angle": "angle between forward and feedback weights (degrees)",
            "symmetry": "|S| / (|S| + |A|) of the Jacobian",
            "cosine": "cosine of e and the true error",
            "settled": "share of samples with a residual",
        }
    },
)
ENERGY_MEASURES = Measures(
    epoch=measured_energy,
    plots={
        "energy.png": {
            "cosine": "cosine of a weight's gradient and the one through time",
            "settled": "share of samples with a residual",
        }
    },
)


def _rules(methods: dict[str, str], make: Callable, kind: type, models: tuple[str, ...], measures: Measures) -> list:
    return [
        Rule(
            name,
            make,
            _trainer(method),
            kind,
            models=models,
            defaults=lambda settings: Defaults(optimizer="sgd", rates=RATES),
            measures=measures,
        )
        for name, method in methods.items()
    ]


RULES = (
    *_rules(METHODS, build, EquilibriumOptions, MODELS, MEASURES),
    *_rules(ENERGY_METHODS, build_energy, EnergyOptions, ENERGY_MODELS, ENERGY_MEASURES),
)
