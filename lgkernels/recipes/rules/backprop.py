"""Back-propagation, and the two ways in which it saves memory: what every other rule is compared with."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ...training import BackpropTrainer
from .. import models, weights
from ..options import UsageError
from . import Defaults, Measures, Rule, Task

ORDER = 60
MICRO_BATCHES = 8  # of bp-accumulate, at most


def build(task: Task) -> list[nn.Module]:
    return models.usual(*task.size) if task.network is None else [task.network]


class Checkpointed(nn.Module):
    """Keeps its input alone, and runs `unit` again in the backward."""

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self.unit, x, use_reentrant=False) if torch.is_grad_enabled() else self.unit(x)


class AccumulatingTrainer(BackpropTrainer):
    """Back-propagation that cuts each batch into micro-batches and steps once."""

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        pairs = list(zip(x.chunk(self.accumulation_steps), target.chunk(self.accumulation_steps)))
        outputs, losses = [], []
        for part in pairs:
            losses.append(super().step(*part))
            outputs.append(self.output)
        self.output = torch.cat(outputs)
        return torch.stack(losses).mean(0)


def _check_batch(settings: Any, options: Any) -> None:
    if _micro_batches(settings.batch_size) == 1:
        raise UsageError(
            f"--batch-size must be divisible by a number from 2 to {MICRO_BATCHES} for bp-accumulate, "
            f"got {settings.batch_size}"
        )


def _micro_batches(batch_size: int) -> int:
    return max(n for n in range(1, MICRO_BATCHES + 1) if batch_size % n == 0)


def _accumulating(blocks: list[nn.Module], optimizer_factory: Any, task: Task, **options: Any) -> AccumulatingTrainer:
    assert task.example is not None
    steps = _micro_batches(len(task.example))
    return AccumulatingTrainer(blocks, optimizer_factory, accumulation_steps=steps, **options)


def _defaults(settings: Any) -> Defaults:
    """`--bp-lr`, where it is given; a network that is tuned takes `--lr` too, as the rules beside it. Of all three:
    they are the same algorithm."""
    return weights.TUNING._replace(lr=("bp_lr", "lr")) if settings.given_start else Defaults(lr=("bp_lr",))


RULES = (
    Rule(
        "bp",
        build,
        starts="either",
        defaults=_defaults,
        measures=Measures(signal_macs=lambda task, image_size: models.gradient_macs(task, image_size)[0]),
    ),
    Rule("bp-accumulate", build, _accumulating, starts="network", defaults=_defaults, check=_check_batch),
    Rule(
        "bp-checkpoint",
        lambda task: [Checkpointed(part) for part in task.network],
        starts="network",
        defaults=_defaults,
    ),
)
