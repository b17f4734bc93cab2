"""Zeroth-order optimisation of a network that has weights: forward passes alone, at the memory of inference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...optim import ZerothOrder
from ...training import BackpropTrainer
from .. import weights
from ..options import UsageError, choice, option, positive
from . import Rule, Task

ORDER = 70
ESTIMATORS, LAWS = ("two-sided", "one-sided", "forward-gradient"), ("sign", "normal", "uniform8", "uniform")


@dataclass(frozen=True)
class ZerothOrderOptions:
    """Of zeroth-order steps."""

    estimator: str = option("two-sided", f"of the derivative along the noise: {', '.join(ESTIMATORS)}")
    directions: int = option(4, "members: directions whose estimates a step averages")
    perturbation: float = option(1e-3, "epsilon, how far along the noise the loss is looked at")
    perturbation_law: str = option("sign", f"of the noise: {', '.join(LAWS)}")

    def __post_init__(self):
        positive(self, "directions", "perturbation")
        choice(self, "estimator", ESTIMATORS)
        choice(self, "perturbation_law", LAWS)


class ZerothOrderTrainer(BackpropTrainer):
    """Steps by values of the loss of the whole network; a batch of an accumulation is a part of the step's."""

    def _step(self, x: Tensor, target: Tensor, last: bool) -> Tensor:
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, ZerothOrder)

        def closure() -> Tensor:
            h = x
            for block in self.blocks:
                h = block(h)
            self.output = h.detach()
            return self.loss(h, target)

        loss = optimizer.accumulate(closure)
        if last:
            optimizer.step()
        return loss.to(x.device).reshape(1)


def trainer(blocks: list[nn.Module], optimizer_factory: Callable, task: Task, **others: Any) -> ZerothOrderTrainer:
    """The command's optimizer gives the learning rate alone."""
    if others.pop("grad_scaler", None) is not None:
        raise UsageError("--amp fp16 is not for zeroth-order: it has no gradient to scale, use bf16")
    options = task.options
    lr = optimizer_factory([nn.Parameter(torch.zeros(1))]).defaults["lr"]

    def factory(parameters: list[nn.Parameter]) -> ZerothOrder:
        return ZerothOrder(
            nn.Sequential(*blocks),
            lr,
            eps=options.perturbation,
            estimator=options.estimator,
            members=options.directions,
            law=options.perturbation_law,
            seed=task.seed,
            impl=task.impl,
        )

    return ZerothOrderTrainer(blocks, factory, **others)


RULES = (
    Rule(
        "zeroth-order",
        lambda task: [task.network],
        trainer,
        ZerothOrderOptions,
        starts="network",
        defaults=lambda settings: weights.TUNING,
    ),
)
