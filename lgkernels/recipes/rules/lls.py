"""LLS, plain and modulated, and its paper's two controls, whose local heads are a random basis and a classifier."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import nn as lnn
from .. import models
from ..options import choice, option, positive
from . import Measures, Rule, Task, blockwise

ORDER = 10

Control = Callable[..., nn.Module]


@dataclass(frozen=True)
class LLSOptions:
    """Of the local heads."""

    temperature: float = option(0.5, "of the softmax of a head's similarities")
    waveform: str = option("square", "of the periodic basis: square, cosine")

    def __post_init__(self):
        positive(self, "temperature")
        choice(self, "waveform", ("square", "cosine"))


def random_basis(block: nn.Module, *, latents: int, hidden: int, num_classes: int, **options: Any) -> nn.Module:
    """LLS with a frozen random basis and without normalisation, as the authors' "LLS_Random"."""
    basis = F.adaptive_avg_pool1d(0.1 * torch.randn(num_classes, hidden), latents)
    return lnn.LLSHead(block, num_classes=num_classes, basis=basis, normalize=False, **options)


def classifier(block: nn.Module, *, latents: int, **options: Any) -> nn.Module:
    """The authors' "LocalLosses", which finds the number of its latents itself."""
    return lnn.PooledClassifier(block, **options)


def build(task: Task, modulation: str | None = None, control: Control | None = None) -> list[nn.Module]:
    options = task.options
    return models.with_heads(
        *task.size,
        temperature=options.temperature,
        waveform=options.waveform,
        impl=task.impl,
        modulation=modulation,
        control=control,
    )


def signal_macs(task: Task, image_size: int, modulation: str | None = None) -> int:
    """The two products of each head with its basis (similarity and its adjoint), with the modulation, and the gradients
    within a block of two convolutions."""
    classes = task.num_classes
    rows = models.reduced_rows(task.model, classes) if modulation == "reduced" else classes
    modulated = {None: 0, "vector": classes}.get(modulation, rows * classes)
    total = 0
    for place in models.walk(task.model, task.in_channels, classes, image_size):
        if place.latents:
            total += 2 * (rows * place.latents + modulated)
        if isinstance(place.layer, models.Separable):
            total += place.inputs * place.outputs * place.size**2
    return total


def _rule(name: str, modulation: str | None = None, control: Control | None = None) -> Rule:
    return Rule(
        name,
        functools.partial(build, modulation=modulation, control=control),
        blockwise,
        LLSOptions,
        heads=True,
        measures=Measures(signal_macs=functools.partial(signal_macs, modulation=modulation)),
    )


RULES = (
    _rule("lls"),
    _rule("lls-m", "vector"),
    _rule("lls-mxm", "matrix"),
    _rule("lls-mxm-reduced", "reduced"),
    _rule("lls-random", control=random_basis),
    _rule("local-classifier", control=classifier),
)
