"""Equilibrium propagation: holomorphic, in continuous time, and the true gradient that it is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import jacobian_symmetry, recurrent_backprop_error, weight_angle
from ...nn import EquilibriumConvNet, EquilibriumMLP
from ...training import EquilibriumTrainer
from ..options import UsageError, choice, option, positive
from . import Defaults, Measures, Rule, Task

ORDER = 55
MODELS = ("eq-mlp", "eq-loop", "eq-conv")
METHODS = {"hep": "holomorphic", "continuous-hep": "continuous", "eq-rbp": "recurrent_backprop"}
RATES = {"sgd": 0.01}
BOUNDS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the histogram of residuals


@dataclass(frozen=True)
class EquilibriumOptions:
    """Of nets that settle."""

    nudge_points: int = option(2, "points N of the circle of nudges; 0: the derivative at no nudge")
    nudge: float = option(0.5, "its radius, beta")
    nudge_steps: int = option(20, "steps of a nudged phase")
    free_steps: int = option(150, "steps of the free phase")
    plateaus: int = option(20, "of continuous-hep, each of --nudge-steps")
    start_angle: float = option(0.0, "between forward and feedback weights at the start, in degrees; 0: symmetric")
    homeostasis: float = option(0.0, "coefficient of the homeostatic loss")
    homeostasis_estimator: str = option("paper", "paper, symmetric, exact")
    schedule: str = option("synchronous", "synchronous, or asynchronous: even and odd layers in turn")
    unsettled: str = option("skip", "a batch whose nudges do not settle: skip, leave_out, raise")

    def __post_init__(self):
        positive(self, "nudge_steps", "free_steps", "plateaus", "nudge")
        choice(self, "homeostasis_estimator", ("paper", "symmetric", "exact"))
        choice(self, "schedule", ("synchronous", "asynchronous"))
        choice(self, "unsettled", ("skip", "leave_out", "raise"))
        if not 0 <= self.nudge_points <= 1024:
            raise UsageError(f"--nudge-points must be 0 to 1024, got {self.nudge_points}")
        if not 0 <= self.start_angle <= 180:
            raise UsageError(f"--start-angle must lie in [0, 180], got {self.start_angle}")
        if not self.homeostasis >= 0:
            raise UsageError(f"--homeostasis must be at least 0, got {self.homeostasis}")


def build(task: Task) -> list[nn.Module]:
    chosen = task.options
    dynamics = dict(
        steps=chosen.free_steps, schedule=chosen.schedule, angle=chosen.start_angle, num_classes=task.num_classes
    )
    if task.model == "eq-conv":
        side = task.image_size
        if not 30 <= side < 46:
            raise UsageError(f"--model eq-conv needs images of 30 to 45 pixels, got {side}: --image-size 32")
        return [EquilibriumConvNet(task.in_channels, impl=task.impl, **dynamics)]
    features, topology = task.in_channels * task.image_size**2, "loop" if task.model == "eq-loop" else "chain"
    return [EquilibriumMLP(features, topology=topology, impl=task.impl, **dynamics)]


def _trainer(method: str) -> Callable[..., EquilibriumTrainer]:
    def trainer(blocks: list[nn.Module], optimizer_factory: Any, task: Task, **options: Any) -> EquilibriumTrainer:
        if options.pop("grad_scaler", None) is not None:
            raise UsageError("--amp fp16 is not for nets that settle: they have no gradient to scale")
        chosen = task.options
        if method == "continuous" and not chosen.nudge_points:
            raise UsageError("--nudge-points must be at least 1 for continuous-hep, got 0")
        (model,) = blocks
        assert isinstance(model, (EquilibriumMLP, EquilibriumConvNet))
        return EquilibriumTrainer(
            model,
            optimizer_factory,
            method=method,  # type: ignore[arg-type]
            points=chosen.nudge_points,
            beta=chosen.nudge,
            nudge_steps=chosen.nudge_steps,
            plateaus=chosen.plateaus,
            homeostasis=chosen.homeostasis,
            estimator=chosen.homeostasis_estimator,
            unsettled=chosen.unsettled,
            seed=task.seed,
            **options,
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
    x, target = run.batch_at(torch.arange(run.settings.batch_size), 0)
    x, weights = model.input_of(x), model.named_weights()
    state, e, _ = trainer._error(weights, x, target, dict(activation=model.activation, loss=model.loss))
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
        residual = trainer.residual
        assert residual is not None
        shares = {f"<= {bound:g}": (residual <= bound).double().mean().item() for bound in BOUNDS}
        record["settled"] = shares
    return record


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
RULES = tuple(
    Rule(
        name,
        build,
        _trainer(method),
        EquilibriumOptions,
        models=MODELS,
        defaults=lambda settings: Defaults(optimizer="sgd", rates=RATES),
        measures=MEASURES,
    )
    for name, method in METHODS.items()
)
