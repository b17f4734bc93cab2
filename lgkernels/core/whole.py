"""Parameters whose values lie elsewhere, as those that torch's `fully_shard` has divided among ranks do."""

from collections.abc import Iterable

import torch
from torch import nn

from .ops import has_an_address


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether it is a DTensor, or another tensor whose memory is not its own."""
    return not has_an_address(type(parameter))


def is_sharded_module(module: nn.Module) -> bool:
    """Whether `fully_shard` has given it a class of its own."""
    return any("FSDP" in base.__name__ for base in type(module).__mro__)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded one, which all ranks ask for together; any other is itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def require_unsharded(model: nn.Module, done: str, first: str) -> None:
    """Raise where `fully_shard` has taken the model or a part of it: what is `done` to it comes first."""
    for name, module in model.named_modules():
        if is_sharded_module(module) or any(map(is_sharded, module.parameters(recurse=False))):
            raise TypeError(
                f"model must be {done} before fully_shard shards its parameters, got {name or 'it'!r}, a "
                f"{type(module).__name__} that is sharded: {first}, then fully_shard"
            )


def require_whole(name: str, parameters: Iterable[torch.Tensor], who: str) -> None:
    """Raise where `who` would be given a sharded parameter."""
    for parameter in parameters:
        if is_sharded(parameter):
            raise TypeError(
                f"{name} must hold whole parameters for {who}, got a {type(parameter).__name__} of shape "
                f"{tuple(parameter.shape)}, whose values lie elsewhere: leave fully_shard out, or use "
                "DistributedDataParallel"
            )
