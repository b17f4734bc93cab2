"""Which of two ways to one result is faster on this processor: measured once, kept in the cache directory.

For what no instruction set decides: the library's products have code of their own for one maker's processors, and run
at half that pace on another's. What is measured is a small problem of ours, never the caller's. The first answer is
kept: as long as the cache directory is, all processes take the same way, and equal runs give equal bits. Under
`torch.use_deterministic_algorithms(True)` nothing is measured, and the way is ours.
"""

import contextlib
import functools
import hashlib
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import native, verdicts
from .records import Records

_ROUNDS = 7
_MARGIN = 0.88  # of our time, at most: an answer that a busy moment could turn is not worth another order of sums
_DAYS_KEPT = 90

Way = Callable[[], object]


def processor_name() -> str:
    """As far as the system tells it."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"model name[ \t]*:[ \t]*(\S.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def processor() -> str:
    """Its name, which may say little (many a virtual "AMD EPYC"), and the instructions that torch uses."""
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _is_stale(about: dict | None, days: float) -> bool:
    """Other processors may share the folder, and other versions be in use beside these."""
    return days > _DAYS_KEPT


@functools.lru_cache(maxsize=1)
def records() -> Records:
    """What was measured on this processor, with this torch and these kernels."""
    about = {
        "processor": processor(),
        "kernels": native.cpu_entries().cpu_level(),
        "torch": str(torch.__version__),
        "sources": verdicts.sources_hash(),
    }
    path = None
    with contextlib.suppress(RuntimeError):  # a user without a home
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = verdicts.directory() / f"processor-{digest}.jsonl"
    return Records(path, about, _is_stale)


def _milliseconds(ways: tuple[Way, Way]) -> tuple[float, float]:
    """The best of some rounds each, in turn."""
    best = [float("inf")] * len(ways)
    for one in ways:
        one()
    for _ in range(_ROUNDS):
        for i, one in enumerate(ways):
            start = time.perf_counter()
            one()
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] * 1e3, best[1] * 1e3


def times(entry: object) -> tuple[float, float] | None:
    """(ours, the other's) milliseconds of a record; None of one that is damaged."""
    if not isinstance(entry, dict):
        return None
    found = entry.get("ours_ms"), entry.get("other_ms")
    if any(type(ms) not in (int, float) or not 0 < ms < float("inf") for ms in found):
        return None
    return found


_answers: dict[str, bool] = {}


def other_is_faster(question: str, make: Callable[[], tuple[Way, Way]]) -> bool:
    """Whether the second of the two ways that `make` returns beats the first, ours, by enough to take it."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    key = f"{question}, {native.threads()} threads"
    if key not in _answers:
        kept = records()
        if times(kept.entries.get(key)) is None:
            ours, other = _milliseconds(make())
            # Unless another process has answered meanwhile: one answer for all.
            damaged = key in kept.entries
            kept.put(key, {"ours_ms": round(ours, 3), "other_ms": round(other, 3)}, replace=damaged)
        ours, other = times(kept.entries[key]) or (1.0, 1.0)
        _answers[key] = other < _MARGIN * ours
    return _answers[key]
