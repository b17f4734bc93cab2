"""The layers that a model applies one after the other, found by their list: a transformer's, a network's stages."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core import checks, constructors, names

Named = list[tuple[str, nn.Module]]
Path = str | Sequence[str] | None


def _alike(module: nn.Module) -> bool:
    """Whether it is a list of two or more layers of one class, with parameters."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = list(module)
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(any(True for _ in child.parameters()) for child in children)
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _found(model: nn.Module) -> list[str]:
    """Names of the lists: the one with most parameters, and its neighbours of the same kind (layer1, ..., layer4)."""
    lists = {name: module for name, module in model.named_modules() if name and _alike(module)}
    if not lists:
        return []
    largest = max(lists, key=lambda name: _size(lists[name]))  # the outermost of those of one size
    parent, kind = largest.rpartition(".")[0], type(next(iter(lists[largest].children())))
    return [
        name
        for name, module in lists.items()
        if name.rpartition(".")[0] == parent and type(next(iter(module.children()))) is kind
    ]


def _paths(model: nn.Module, path: Any) -> list[str]:
    if path is None:
        return [""] if isinstance(model, nn.Sequential) else _found(model)
    paths = list(constructors.texts("path", path))
    modules = dict(model.named_modules())
    if not paths:
        raise ValueError(f"path must name lists of layers of the model ({_found(model)}), got {checks.got(path)}")
    for name in paths:
        if name not in modules:
            near = names.near(name, modules) or f"its lists of layers are {', '.join(_found(model)) or 'none'}"
            raise ValueError(f"path must name a list of layers of the model, got {name!r}; {near}")
        if not any(True for _ in modules[name].children()):
            raise ValueError(f"path must name a list of layers, got {name!r}, a {type(modules[name]).__name__}")
    return paths


def layers_of(model: nn.Module, path: Path = None) -> Named:
    """(qualified name, module) of the layers in the order of their lists; empty where no list is found.

    Args:
        path (str, or several): the qualified name of a ``ModuleList`` or ``Sequential`` ("model.layers",
            "transformer.h"); several are one list in that order. None: the children of a Sequential, else the list of
            two or more layers of one class with most parameters, together with its neighbours of the same kind.
    """
    found: Named = []
    for name in _paths(model, path):
        prefix = name + "." if name else ""
        found += [(prefix + child, module) for child, module in model.get_submodule(name).named_children()]
    return found


def starts_of(units: int | Sequence[int] | None, count: int, what: str = "layers") -> list[int]:
    """The numbers of the layers at which units begin, 0 among them.

    Args:
        units: how many, of equally many layers; or where units but the first begin; None: one for each layer.
    """
    if units is None:
        return list(range(count))
    if isinstance(units, (list, tuple)):
        starts = [0, *(checks.whole_number(f"units[{i}]", start) for i, start in enumerate(units))]
        if sorted(set(starts)) != starts or starts[-1] >= count:
            raise ValueError(f"units must be increasing {what[:-1]} numbers in [1, {count - 1}], got {list(units)}")
        return starts
    number = constructors.size("units", units)
    if number > count:
        raise ValueError(f"units must be at most {count}, the {what} of the model, got {number}")
    return [i * count // number for i in range(number)]
