"""Targets are checked before anything moves: no update, and no running statistic, of a batch that raises."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core import checks
from ..core.ops import class_indices


def classes(output: torch.Tensor, loss: Any) -> int:
    """How many of them an output tells apart: cross entropy has them in dimension 1."""
    return output.shape[1 if loss is F.cross_entropy and output.dim() > 1 else -1]


def checked(target: torch.Tensor, number: int, loss: Any) -> torch.Tensor:
    """Class indices below `number` as int64 (-100 too, which cross entropy ignores), or so many columns as they are."""
    if not target.is_floating_point():
        return class_indices("target", target, number, -100 if loss is F.cross_entropy else None)
    if target.dim() == 2 and target.shape[1] != number:
        raise ValueError(f"target must be (B, {number}), one column per output, got shape {checks.shape_of(target)}")
    return target


@contextlib.contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Where the body raises, the modules' buffers are as before it: for a first step, when nobody knows yet how many
    classes the output has."""
    before = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
