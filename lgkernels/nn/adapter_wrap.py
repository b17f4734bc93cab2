"""Adapters put into a model: which layers can have one, and how it comes to stand there."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .adapter_base import Adapter, is_conv1d
from .adapter_lokr import LoKrConv2d, LoKrLinear
from .adapter_lora import LoRAConv2d, LoRALinear

KINDS: dict[str, dict[type[nn.Module], Any]] = {
    "lora": {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d},
    "lokr": {nn.Linear: LoKrLinear, nn.Conv2d: LoKrConv2d},
}


def layer_of(module: nn.Module) -> nn.Module:
    """What an adapter stands around; any other module is itself."""
    return module.base if isinstance(module, Adapter) else module


def adapter_of(kind: str, module: nn.Module) -> Any:
    """The adapter's class for a layer, which may have adapters, None where there is none."""
    base = layer_of(module)
    return KINDS[kind].get(nn.Linear if is_conv1d(base) else type(base))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, at every place where they stand; what is in an adapter is not listed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in modules.items() if isinstance(module, Adapter))
    return {name: module for name, module in modules.items() if not name or not name.startswith(inside)}


def adapted(model: nn.Module) -> dict[str, Adapter]:
    """The layers of the model that have adapters, each under its first name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapter) and m.is_first}


def adapter_names(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in adapted(model).values() for name in layer.named_adapters()))


def check_new_name(model: nn.Module, name: Any) -> None:
    """Of an adapter that the model gets."""
    check_name(name)
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name must be no attribute of torch.nn.ModuleDict, which holds adapters by name, got {name!r}"
        )
    for at, layer in adapted(model).items():
        if name in layer.named_adapters():
            kind = type(layer.named_adapters()[name]).__name__
            raise ValueError(
                f"adapter_name must be one that model has not yet, got {name!r}, which is a {kind} at {at!r}"
            )
        if layer.merged:
            raise ValueError(f"model must not be merged, got {at or 'a layer'!r} merged: unmerge(model) first")


def check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a str, got {type(name).__name__}")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"adapter_name must be of letters, digits, - and _, got {name!r}")


def owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of the modules that have each parameter."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {p for p in module._parameters.values() if p is not None}:
            found.setdefault(parameter, []).append(name)
    return found


def make(
    model: nn.Module, wrap: Iterable[tuple[nn.Module, list[str]]], new: Callable[[nn.Module, str], Adapter]
) -> list[tuple[list[str], Adapter]]:
    """`new(layer, name)` for each of (module, its names); one that fails leaves the model as it was."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        return [(at, _named(new, layer_of(module), at[0])) for module, at in wrap]
    except Exception:
        for p in learning:  # those before the one that failed have frozen their layers
            p.requires_grad_(True)
        raise


def _named(new: Callable[[nn.Module, str], Adapter], layer: nn.Module, name: str) -> Adapter:
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"layer {name!r} must hold its weight as a parameter, got one that is made at each forward, as pruning, "
            "weight_norm and spectral_norm do: take them off first (torch.nn.utils.prune.remove, remove_weight_norm)"
        )
    try:
        return new(layer, name)
    except ValueError as error:
        if str(error).startswith("base "):
            raise ValueError(f"layer {name!r}: {error}") from None
        raise


def put(
    model: nn.Module,
    adapters: list[tuple[list[str], Adapter]],
    name: str,
    in_full: Iterable[str] = (),
    is_trainable: bool = True,
) -> None:
    """Freeze the model and let the adapters stand in it, active alone. `in_full`: the modules that learn with them."""
    model.requires_grad_(False)
    modules, shared = layers(model), owners(model)
    for at, adapter in adapters:
        adapter.is_trainable, adapter.modules_to_save = is_trainable, tuple(in_full)
        if isinstance(first := modules[at[0]], Adapter):
            first.add(name, adapter)
            continue
        adapter.shared = len(shared[adapter.base.weight]) > 1
        adapter.adapter_name = name
        for place in at:
            parent, _, child = place.rpartition(".")
            setattr(modules[parent], child, adapter)
    activate(model, {name: 1.0})


def activate(model: nn.Module, weights: dict[str, float]) -> None:
    """These adapters work, and learn if they may, with what they train in full; the others do neither."""
    modules = layers(model)
    learns: dict[nn.Parameter, bool] = {}  # of what some adapter trains in full
    for first in adapted(model).values():
        first.active = dict(weights)
        for name, adapter in first.named_adapters().items():
            for factor in adapter.parameters(recurse=False):
                factor.requires_grad_(name in weights and adapter.is_trainable)
            for at in adapter.modules_to_save:
                for p in own_parameters(modules[at]) if at in modules else ():
                    learns[p] = learns.get(p, False) or (name in weights and adapter.is_trainable)
    for p, value in learns.items():
        p.requires_grad_(value)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Of the module itself, or of the layer that an adapter stands around."""
    return list(layer_of(module).parameters(recurse=False))


def in_full(model: nn.Module, name: str) -> set[str]:
    """The modules that belong to an adapter in full: those that it was made or loaded with, and what else learns
    now, unless it is another adapter's that is active instead."""
    by_adapter: dict[str, set[str]] = {}
    active = False
    for first in adapted(model).values():
        active = active or name in first.active
        for key, adapter in first.named_adapters().items():
            by_adapter.setdefault(key, set()).update(adapter.modules_to_save)
    mine, modules = by_adapter.pop(name, set()), layers(model)
    others = () if active else [at for theirs in by_adapter.values() for at in theirs if at in modules]
    theirs = {p for at in others for p in own_parameters(modules[at])}
    return mine | {
        at
        for at, module in modules.items()
        if at
        and not isinstance(module, Adapter)
        and any(p.requires_grad and p not in theirs for p in own_parameters(module))
    }
