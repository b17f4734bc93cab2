"""A run of a backend's Python on meta tensors, in which launches are noted and nothing is computed.

It tells which kernels a call starts, with which blocks, warps and stages, before any of them runs.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

_lock = threading.Lock()
_launches: list[tuple] = []
_architecture: int | str = "interpret"


def note(kernel: Any, options: dict) -> None:
    """A launch on meta tensors (ops/common/launch.py)."""
    _launches.append((getattr(kernel, "__name__", str(kernel)), *sorted((k, str(v)) for k, v in options.items())))


def architecture() -> int | str:
    """The one that meta tensors stand for."""
    return _architecture


def launches(run: Callable[[], Any], arch: int | str) -> tuple[tuple, ...]:
    """What `run`, on meta tensors, would launch on this architecture, in order."""
    global _architecture
    with _lock:
        _launches.clear()
        _architecture = arch
        with torch.no_grad():
            run()
        return tuple(_launches)
