"""The rules of the command as records. A file of this folder holds those of one family as `RULES`, and is found.

It may also hold `PRESETS`, settings of a publication (name -> settings), and `ORDER`, its place in help and messages.
"""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...training import BackpropTrainer, BlockwiseTrainer
from ...training.trainer import Trainer
from .. import options as _options


class Task(NamedTuple):
    """What a rule is to train: a model by its name, or a network as it is."""

    rule: "Rule"
    options: Any  # of the rule's `options`
    model: str = ""
    in_channels: int = 1
    num_classes: int = 10
    image_size: int = 28
    seed: int = 0  # of what is random in the rule: weights come from torch's generator
    impl: str = "auto"  # of the rule's kernels
    network: nn.Sequential | None = None  # where the rule tunes: parts that are not cut, with their weights
    example: Tensor | None = None  # and a batch of training images for it, on its device

    @property
    def size(self) -> tuple[str, int, int]:
        return self.model, self.in_channels, self.num_classes


class Defaults(NamedTuple):
    """What a rule trains with where the command is silent."""

    optimizer: str | None = None  # None: the command's
    rates: Mapping[str, float] = {}  # optimizer -> learning rate, where it is not the usual one
    lr: tuple[str, ...] = ("lr",)  # the settings that may give the rate, in the order in which they count


class Measures(NamedTuple):
    """What is measured besides time, memory and accuracy."""

    signal_macs: Callable[[Task, int], int] | None = None
    """(task, image size) -> multiply-accumulates for each sample that carry the learning signal to the layers."""
    epoch: Callable[[Any], dict[str, Any]] | None = None
    """(`loop.Run`) -> what an epoch's record gets."""
    plots: Mapping[str, Mapping[str, str]] = {}
    """Picture -> key of that record, layer -> value -> label of its axis."""
    end: Callable[[Any, list, dict[str, Any]], dict[str, Any]] | None = None
    """(fresh `loop.Run`, records of the epochs, figures so far) -> figures of results.json."""
    columns: tuple["Column", ...] = ()


class Column(NamedTuple):
    """How the final table shows one figure of results.json."""

    title: str
    key: str
    text: Callable[[Any], str]
    note: str = ""


def blockwise(blocks: list[nn.Module], optimizer_factory: Callable, task: Task, **options: Any) -> Trainer:
    return BlockwiseTrainer(blocks, optimizer_factory, **options)


def backprop(blocks: list[nn.Module], optimizer_factory: Callable, task: Task, **options: Any) -> Trainer:
    return BackpropTrainer(blocks, optimizer_factory, **options)


@dataclass(frozen=True)
class NoOptions:
    """Of a rule that has none."""


@dataclass(frozen=True)
class Rule:
    """A way to train, as `python -m lgkernels train --rule NAME` offers it.

    Args:
        name: as the command writes it.
        build: makes the trainer's blocks.
        trainer: (blocks, optimizer factory, task, **options of `training.Trainer`) -> trainer.
        options: dataclass whose fields (`options.option`) are the rule's options; its `__post_init__` refuses values by
            a ValueError. Rules that share a class share its options.
        starts: "random" (`build` makes the model by its name), "network" (it cuts the task's network, which has given
            or random weights), or "either": the network where there are given weights.
        heads: whether it needs the sizes of local heads, which the tables of `models` have.
        models: names of networks of its own, the usual one first; then it trains no others.
        defaults: (`settings.Settings`) -> Defaults.
        check: (`settings.Settings`, options) raises a ValueError where the two do not fit.
        before_step: (`loop.Run`, the epoch's order of samples), before each step.
        measures: what is measured besides.
    """

    name: str
    build: Callable[[Task], list[nn.Module]]
    trainer: Callable[..., Trainer] = backprop
    options: type = NoOptions
    starts: str = "random"
    heads: bool = False
    models: tuple[str, ...] = ()
    defaults: Callable[[Any], Defaults] = lambda settings: Defaults()
    check: Callable[[Any, Any], None] = lambda settings, options: None
    before_step: Callable[[Any, Tensor], None] | None = None
    measures: Measures = Measures()

    @property
    def python_name(self) -> str:
        return _options.python_name(self.name)

    def tunes(self, settings: Any) -> bool:
        """Whether it starts from a network under these settings."""
        return self.starts == "network" or self.starts == "either" and settings.given_start


@functools.cache
def families() -> dict[str, ModuleType]:
    """Family -> its module, in order."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return dict(sorted(modules.items(), key=lambda item: (getattr(item[1], "ORDER", math.inf), item[0])))


@functools.cache
def found() -> dict[str, Rule]:
    """Name -> rule, of all families."""
    result: dict[str, Rule] = {}
    for family, module in families().items():
        for rule in module.RULES:
            if rule.name in result:
                raise ValueError(f"rule {rule.name!r} of {family} has a name that another family's rule has")
            result[rule.name] = rule
    return result


def get(name: str) -> Rule:
    """The rule of that name."""
    _options.known("rule", name, found())
    return found()[name]


def own_models() -> list[str]:
    """Names of the networks that single rules bring along."""
    return list(dict.fromkeys(name for rule in found().values() for name in rule.models))


def presets() -> dict[str, dict[str, Any]]:
    """Name -> settings, of all families."""
    return {name: preset for module in families().values() for name, preset in getattr(module, "PRESETS", {}).items()}


def by_options() -> dict[type, list[str]]:
    """Dataclass with options of its own -> the names of the rules that have them."""
    result: dict[type, list[str]] = {}
    for rule in found().values():
        for kind in reversed(rule.options.__mro__[:-1]):
            if _options.own_fields(kind):
                result.setdefault(kind, []).append(rule.name)
    return result
