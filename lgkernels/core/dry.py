"""A run of a backend's Python on meta tensors, in which launches are noted and nothing is computed.

It tells which kernels a call starts, with which blocks, warps and stages, before any of them runs, and what memory it
would take.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_lock = threading.Lock()
_launches: list[tuple] = []
_architecture: int | str = "interpret"


def note(kernel: Any, arguments: tuple, options: dict) -> None:
    """A launch on meta tensors (ops/common/launch.py)."""
    words = [(name, str(value)) for name, value in options.items()]
    # Triton compiles a kernel anew for an int of 1, or a multiple of 16 (no kernel of the interpreter has `params`)
    for parameter, value in zip(getattr(kernel, "params", ()), arguments):
        if type(value) is int and not parameter.do_not_specialize:
            words.append((parameter.name, "1" if value == 1 else "16" if value % 16 == 0 else "int"))
    _launches.append((getattr(kernel, "__name__", str(kernel)), *sorted(words)))


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


class _Memory(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are alive, and how many there were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.users: Counter[int] = Counter()  # of each storage: a view is one more
        self.alive: dict[int, weakref.ref] = {}

    def _add(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), id(tensor)
        place, size = storage._cdata, storage.nbytes()

        def gone(_):
            del self.alive[key]
            self.users[place] -= 1
            if not self.users[place]:
                self.live -= size

        if key not in self.alive:
            self.alive[key] = weakref.ref(tensor, gone)
            self.live += 0 if self.users[place] else size
            self.users[place] += 1
            self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        return result


def peak(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that `run`, which makes them on the meta device, would hold at once."""
    with torch.no_grad(), _Memory() as memory:
        run()
    return memory.peak
