"""What a zeroth-order optimizer has to see: its parameters in the model's places, and their use in the closure."""

import warnings
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.whole import is_sharded, is_sharded_module


def places(model: nn.Module, params: list[Tensor]) -> list[int]:
    """In how many places of the model each parameter stands."""
    found = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [found[id(p)] for p in params]


def require_places(model: nn.Module, named: dict[str, Tensor], before: list[int]) -> None:
    """Raise where something else has taken a parameter's place since: it would never be stepped."""
    for name, was, now in zip(named, before, places(model, list(named.values()))):
        if now >= was:
            continue
        if any(map(is_sharded_module, model.modules())) or any(map(is_sharded, model.parameters())):
            raise RuntimeError(
                "model must hold whole parameters for ZerothOrder, got one that fully_shard has sharded since, with "
                "parameters in the place of those that are tuned: leave fully_shard out, or use DistributedDataParallel"
            )
        raise RuntimeError(
            f"model must hold the parameters that ZerothOrder was made with, got {name!r} replaced or removed: write "
            "to it in place (copy_, load_state_dict without assign=True), or make ZerothOrder afterwards"
        )


def require_use(model: nn.Module, named: dict[str, Tensor], used: set[str], first: bool) -> None:
    """Raise where nothing is used, where a parameter is out of sight for ever, and where several processes run, which
    could differ in what they step; of the first step warn."""
    unused = [name for name in named if name not in used]
    if not unused:
        return
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    hidden = {id(p) for module in scripted for p in module.parameters()}
    got = f"got {unused[0]!r}{f' and {len(unused) - 1} more' if len(unused) > 1 else ''}"
    if not used or any(id(named[name]) in hidden for name in unused):
        raise ValueError(
            f"include must pick parameters that the closure uses in functions of torch, {got}, which it does not use "
            "(or inside of TorchScript, whose code cannot be replaced)"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"include must pick parameters that each step uses where several processes run, {got}, which this step "
            "does not use: the processes would differ in what they move"
        )
    if first:
        warnings.warn(
            f"closure should use all parameters that are tuned, {got}, which the first step does not use: a step moves "
            "what it uses alone. Leave out by include= what no step uses",
            stacklevel=4,
        )
