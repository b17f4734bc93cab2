"""The command's optimizers, and the learning rate of a rule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .rules import Rule

# The paper's for its optimizer. Of 1e-3, 2e-3 and 5e-3, 5e-3 also served BP best (SmallConv, embedded data set).
LEARNING_RATES = {"adamw-schedule-free": 5e-3, "adamw": 1e-3, "adam": 1e-3, "sgd": 0.05}


def factory(name: str, lr: float) -> Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]:
    """Callable: parameters -> optimizer, with the settings of the LLS paper where it has any."""
    if name == "adamw-schedule-free":
        from schedulefree import AdamWScheduleFree

        return lambda parameters: AdamWScheduleFree(parameters, lr=lr, betas=(0.9, 0.999))
    if name == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return lambda parameters: {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, lr=lr)


def learning_rate(settings: Any, rule: Rule) -> float:
    """The rate that `settings` (`settings.Settings`) give the rule, or its own default, or the optimizer's."""
    defaults = rule.defaults(settings)
    given = [rate for name in defaults.lr if (rate := getattr(settings, name)) is not None]
    return given[0] if given else {**LEARNING_RATES, **defaults.rates}[settings.optimizer]
