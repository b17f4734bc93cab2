"""Blocks with sharded parameters, of torch's `fully_shard`: how gradients reach them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..core.whole import is_sharded


def backward(root: torch.Tensor, gradient: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Gradients of `root` into `parameters`. Those that are sharded are no leaves of its graph: their weights were
    gathered for the forward, and hooks bring the gradients back."""
    if any(map(is_sharded, parameters)):
        root.backward(gradient)
    else:  # not autograd.grad: DDP's hooks run where gradients reach the parameters
        root.backward(gradient, inputs=parameters)


class Places:
    """Where a trainer's parameters lie in its blocks."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._found: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (module._parameters, name, parameter)
            for block in blocks
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad and not is_sharded(parameter)
        ]

    def require_same(self) -> None:
        """Raise where a parameter has been sharded since: the optimizers hold the former one."""
        for parameters, name, mine in self._found:
            now = parameters.get(name)
            if now is not mine and now is not None and is_sharded(now):
                raise RuntimeError(
                    f"blocks must be sharded before the trainer is made, got one sharded after it ({name} of shape "
                    f"{tuple(mine.shape)}): the optimizers hold its former parameters"
                )
