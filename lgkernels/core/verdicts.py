"""Verdicts on kernels, kept in the user's cache directory: what has passed its trial here, what has not.

One file a fingerprint (GPU, driver, torch, Triton, the native module, the library's sources): after an update of any
of them everything is tried again. A file is written whole and put in place by `os.replace`, what others wrote since
merged in; where nothing can be written, verdicts live in memory. "running" is noted before a trial: if the process
that noted it is gone, the kernel took it down, and is not tried again.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from . import native

GOOD, BAD, RUNNING = "good", "bad", "running"


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
    try:
        import triton
    except ImportError:
        return "not installed"
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


class Verdicts:
    """Those of one device; `path` is None where nothing can be written."""

    def __init__(self, device: torch.device) -> None:
        self.fingerprint = fingerprint(device)
        text = json.dumps(self.fingerprint, sort_keys=True)
        self.path: Path | None = None
        with contextlib.suppress(RuntimeError):  # a user without a home
            self.path = directory() / f"verdicts-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.known: dict[str, dict] = {}
        self._mine: dict[str, dict] = {}  # noted by this process: what others noted since is theirs
        self.read()

    def read(self) -> None:
        """Take over what the file says; a damaged one counts as empty."""
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                self.known = {**json.loads(self.path.read_text())["verdicts"], **self._mine}

    def state(self, key: str) -> tuple[str | None, str]:
        """(GOOD, BAD, or None: to be tried; why)."""
        entry = self.known.get(key)
        if not isinstance(entry, dict) or entry.get("state") not in (GOOD, BAD, RUNNING):
            return None, ""
        if entry["state"] != RUNNING:
            return entry["state"], entry.get("why", "")
        if entry.get("node") != platform.node():
            return None, ""  # of another machine that shares this home: nothing is known of its process
        if entry.get("boot") == _boot() and _is_alive(entry.get("pid", -1), entry.get("started", "")):
            return None, ""  # another process tries it at this moment
        return BAD, "a process that tried it ended in the middle"

    def note(self, key: str, state: str, what: str, why: str = "") -> None:
        entry = {"state": state, "what": what} | ({"why": why} if why else {})
        if state == RUNNING:
            entry |= {"pid": os.getpid(), "started": _started(os.getpid()), "node": platform.node(), "boot": _boot()}
        self.known[key] = self._mine[key] = entry
        self._write()

    def forget(self, key: str) -> None:
        """A trial that ended without a verdict (interrupted, or no memory)."""
        self._mine.pop(key, None)
        self.known.pop(key, None)
        self._write(without=key)

    def _write(self, without: str | None = None) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self.read()
                if without is not None:
                    self.known.pop(without, None)
                text = json.dumps({"fingerprint": self.fingerprint, "verdicts": self.known}, indent=1, sort_keys=True)
                handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
                try:
                    with os.fdopen(handle, "w") as file:
                        file.write(text)
                    os.replace(name, self.path)
                except BaseException:
                    os.unlink(name)
                    raise
        except OSError:  # a read-only home: memory serves this process
            self.path = None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the file system has locks; without them a verdict may be lost, and is found again."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
