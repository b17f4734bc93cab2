"""Auxiliary nets of local losses, made of the layers that follow a unit."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core import constructors
from .layered import Before, Behind, Context

__all__ = ["auxiliary_nets"]


def _ends(part: nn.Module) -> bool:
    return any(isinstance(m, (Before, Behind)) for m in part.modules())


def auxiliary_nets(units: Sequence[nn.Sequential], layers: int = 1) -> list[nn.Sequential]:
    """For each unit but the last: a copy of the first parts of the units that follow, for the `aux` of a local head.

    Each copy has weights of its own, equal to the layers' as they are now, and is trained by its unit's loss alone; the
    classifier, the last part, is in none.

    Args:
        units (list of nn.Sequential): of :func:`split_blocks`.
        layers (int): how many parts; fewer where there are no more.

    Returns:
        list of nn.Sequential: one less than the units; an empty one before a unit of the classifier alone.

    Raises: ValueError, TypeError naming the argument.

    Source: Ma, Yang, Wu, Yan, "Scaling supervised local learning with augmented auxiliary networks", ICLR 2024 (which
    spreads its layers over all that follow, and adapts their widths).

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> from lgkernels.training import auxiliary_nets, split_blocks
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
        >>> units = split_blocks(model, [2, 4])
        >>> nets = auxiliary_nets(units, 2)
        >>> [len(net) for net in nets]
        [2, 1]
        >>> heads = [lnn.LocalClassifier(unit, 8, 3, aux=net) for unit, net in zip(units, nets)]
    """
    units = constructors.several("units", units, nn.Sequential, "nn.Sequentials, the units")
    layers = constructors.size("layers", layers)
    nets = []
    for i in range(1, len(units)):
        following = [part for unit in units[i:] for part in unit][:-1]
        chosen: list[nn.Module] = []
        for part in following[:layers]:
            if _ends(part):  # it belongs together with others of its stage
                break
            chosen.append(part)
        contexts: dict[int, Any] = {  # masks and positions are those of the model's own forward
            id(m.context): m.context
            for part in chosen
            for m in part.modules()
            if isinstance(getattr(m, "context", None), Context)
        }
        nets.append(nn.Sequential(*(copy.deepcopy(part, dict(contexts)) for part in chosen)))
    return nets
