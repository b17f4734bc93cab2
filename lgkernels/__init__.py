"""Fused kernels for training neural networks without (full) back-propagation."""

import importlib as _importlib
from typing import Any as _Any

from . import _moved

__version__ = "0.1.0"

_SUBMODULES = ("functional", "nn", "optim", "random", "training")
_FROM_NN = ("alignment", "convert", "feedback_state", "load_feedback_state", "weight_ratio")

_moved.install()


def __getattr__(name: str) -> _Any:
    """Submodules load at first use: `import lgkernels` itself costs nothing, and torch's settings are still open."""
    if name in _SUBMODULES:
        return _importlib.import_module(f"lgkernels.{name}")
    if name in _FROM_NN:
        return getattr(_importlib.import_module("lgkernels.nn"), name)
    if name == "plan":
        return _importlib.import_module("lgkernels.training.planner").plan
    if name == "load_run":
        return _importlib.import_module("lgkernels.recipes.trained").load_run
    raise AttributeError(f"module 'lgkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *_FROM_NN, "load_run", "plan"})
