"""Tuning a network unit by unit: Forward-Forward, LoCo, GIM, predsim. See `units`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .. import units, weights
from ..options import choice, not_negative, option, positive, python_name
from . import Rule, Task, blockwise

ORDER = 40


@dataclass(frozen=True)
class UnitOptions:
    """Of the units."""

    units: int = option(4, "number of units with a loss of their own")
    overlap: int = option(1, "loco: parts of the next unit that a unit's loss goes through")
    contrast: str = option("nt-xent", "loss of loco and gim: nt-xent (two views), supcon (labels)")

    def __post_init__(self):
        choice(self, "contrast", ("nt-xent", "supcon"))
        not_negative(self, "overlap")
        positive(self, "units")


def _build(wrap: Callable[[UnitOptions], units.Wrap], task: Task) -> list[nn.Module]:
    assert task.network is not None and task.example is not None
    options = task.options
    return units.local_blocks(wrap(options), task.network, task.example, task.num_classes, options.units)


def _loco(options: UnitOptions) -> units.Wrap:
    return functools.partial(units.contrastive, loss=python_name(options.contrast), overlap=options.overlap)


def _gim(options: UnitOptions) -> units.Wrap:
    return functools.partial(units.contrastive, loss=python_name(options.contrast))


RULES = tuple(
    Rule(
        name,
        functools.partial(_build, wrap),
        blockwise,
        UnitOptions,
        starts="network",
        defaults=lambda settings: weights.TUNING,
    )
    for name, wrap in (
        ("forward-forward", lambda options: units.forward_forward),
        ("loco", _loco),
        ("gim", _gim),
        ("predsim", lambda options: units.predsim),
    )
)
