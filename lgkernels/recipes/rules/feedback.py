"""Errors go back through other matrices than the weights: FA, and sign-symmetry (uSF, frSF, brSF, signed-init)."""

from torch import nn

from ... import nn as lnn
from .. import instruments, models
from . import Measures, Rule, Task

ORDER = 20


def build(task: Task) -> list[nn.Module]:
    blocks = models.plain(*task.size)
    name = task.rule.python_name
    signs = {"signs": "formula"} if name == "signed_init" else {}  # nothing is trained yet
    lnn.convert(nn.Sequential(*blocks), name, seed=task.seed, impl=task.impl, verbose=False, **signs)
    return blocks


MEASURES = Measures(
    # as back-propagation: the gradients to the inputs of all layers but the first
    signal_macs=lambda task, image_size: models.gradient_macs(task, image_size)[0],
    epoch=lambda run: instruments.of(run.trainer.blocks),
    plots=instruments.PLOTS,
)
RULES = tuple(Rule(name, build, measures=MEASURES) for name in ("fa", "usf", "frsf", "brsf", "signed-init"))
