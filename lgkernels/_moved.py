"""Modules under their former names: what was pickled whole (`torch.save(model)`) holds the path of its classes.

A row is a module that is no more, and where its names are now. Nothing is loaded before somebody asks for one.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "lgkernels.nn.adapter_layers": ("lgkernels.nn", "lgkernels.nn.adapter_base"),
    "lgkernels.nn.classifier": ("lgkernels.nn",),
    "lgkernels.nn.local": ("lgkernels.nn",),
    "lgkernels.recipes.tuning": ("lgkernels.recipes.units", "lgkernels.recipes.rules.backprop"),
}


class _Finder:
    """The last of `sys.meta_path`: it is asked for what nobody else has found."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder) if name in MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None  # an ordinary one

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        def attribute(name: str) -> Any:
            for place in MOVED[module.__name__]:
                if hasattr(found := importlib.import_module(place), name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = attribute  # type: ignore[method-assign]


def install() -> None:
    """Let `import` find them."""
    sys.meta_path.append(_Finder)  # type: ignore[arg-type]
