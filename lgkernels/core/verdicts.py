"""Verdicts on kernels, kept in the user's cache directory: what has passed its trial here, what has not.

One file a fingerprint (GPU, driver, torch, Triton, the native module, the library's sources): after an update of any
of them everything is tried again. Where nothing can be written, verdicts live in memory. "running" is noted before a
trial: if the process that noted it is gone, the kernel took it down, or somebody ended it at that moment. After the
second such end the kernel is not tried again.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from . import environment, native
from .records import Records

GOOD, BAD, RUNNING = "good", "bad", "running"
_STRIKES = 2  # ends in the middle of a trial that condemn a kernel
_DAYS_KEPT, _DAYS_OF_SOURCES = 90, 7  # of files that nothing uses


def directory() -> Path:
    """LGKERNELS_CACHE_DIR, else the system's place for caches."""
    given = os.environ.get("LGKERNELS_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "lgkernels"


@functools.lru_cache(maxsize=1)
def sources_hash() -> str:
    """Of the Python sources that decide what a kernel is, and of the native module."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [*package.glob("core/*.py"), *package.glob("ops/**/*.py")]
    module = native.native()
    for path in [*sorted(files), *([Path(module.__file__)] if module else [])]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    return str(torch._C._cuda_getDriverVersion()) if torch.cuda.is_available() else "none"


def _triton() -> str:
    if environment.triton_fault():
        return "none"
    import triton

    return triton.__version__


def fingerprint(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, sm_{properties.major}{properties.minor}"
    else:
        gpu = f"{device.type}, {platform.machine()}"
    return {
        "gpu": gpu,
        "driver": _driver(),
        "torch": str(torch.__version__),
        "triton": _triton(),
        "sources": sources_hash(),
    }


@functools.lru_cache(maxsize=1)
def _boot() -> str:
    """Which run of this machine a process number belongs to."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str:
    """When a process began: a number alone may be another's by now, or the same in a container begun anew."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return _started(pid) == started


def _has_ended(entry: dict) -> bool:
    """Whether a process of this machine began the trial and is gone; nothing is known of those of another machine."""
    if entry.get("state") != RUNNING or entry.get("node") != platform.node():
        return False
    return entry.get("boot") != _boot() or not _is_alive(entry.get("pid", -1), entry.get("started", ""))


class Verdicts:
    """Those of one device."""

    def __init__(self, device: torch.device) -> None:
        self.fingerprint = fingerprint(device)
        text = json.dumps(self.fingerprint, sort_keys=True)
        path = None
        with contextlib.suppress(RuntimeError):  # a user without a home
            path = directory() / f"verdicts-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._records = Records(path, self.fingerprint, self._is_stale)

    @property
    def path(self) -> Path | None:
        """None where nothing can be written."""
        return self._records.path

    @property
    def known(self) -> dict[str, dict]:
        return self._records.entries

    def state(self, key: str) -> tuple[str | None, str]:
        """(GOOD, BAD, or None: to be tried; why)."""
        entry = self.known.get(key, {})
        if entry.get("state") in (GOOD, BAD):
            return entry["state"], entry.get("why", "")
        if _has_ended(entry) and entry.get("left", 0) + 1 >= _STRIKES:
            return BAD, f"{_STRIKES} processes that tried it ended in the middle"
        return None, ""

    def note(self, key: str, state: str, what: str, why: str = "") -> None:
        entry = {"state": state, "what": what} | ({"why": why} if why else {})
        if state == RUNNING:
            self._records.read()
            before = self.known.get(key, {})
            entry |= {"pid": os.getpid(), "started": _started(os.getpid()), "node": platform.node(), "boot": _boot()}
            entry["left"] = before.get("left", 0) + _has_ended(before)
        self._records.put(key, entry)

    def forget(self, key: str) -> None:
        """A trial that ended without a verdict (interrupted, or no memory), or that is to be repeated."""
        self._records.put(key, {})

    def forget_all(self) -> int:
        """As if nothing had been tried on this device. Returns how many verdicts there were."""
        return self._records.clear()

    def _is_stale(self, theirs: dict | None, days: float) -> bool:
        """Whether verdicts that nobody has read for so long may go: this device's under other versions (it may have
        several environments, and other machines may share the folder), sooner where only the sources are others."""
        if theirs is None:  # damaged
            return days > _DAYS_KEPT
        changed = {name for name, value in self.fingerprint.items() if theirs.get(name) != value}
        return "gpu" not in changed and days > (_DAYS_OF_SOURCES if changed == {"sources"} else _DAYS_KEPT)
