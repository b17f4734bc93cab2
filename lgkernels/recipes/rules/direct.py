"""Direct feedback: the output's error (DFA, sDFA) or the target (DRTP) goes straight to every block."""

from typing import Any

from torch import nn

from ...training import DirectTrainer
from .. import models
from . import Measures, Rule, Task

ORDER = 30


def build(task: Task) -> list[nn.Module]:
    return models.plain(*task.size)


def trainer(blocks: list[nn.Module], optimizer_factory: Any, task: Task, **options: Any) -> DirectTrainer:
    return DirectTrainer(blocks, optimizer_factory, rule=task.rule.python_name, seed=task.seed, **options)


def signal_macs(task: Task, image_size: int) -> int:
    """The projections of the error to each block, and the gradients within a block of several layers."""
    within, sizes = models.gradient_macs(task, image_size, cut=True)
    gathers = task.rule.name == "drtp"  # a row of the matrix for each target: no product
    return within + (0 if gathers else task.num_classes * sum(sizes))


RULES = tuple(
    Rule(name, build, trainer, measures=Measures(signal_macs=signal_macs)) for name in ("dfa", "sdfa", "drtp")
)
