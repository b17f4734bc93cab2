"""The folder of a run: made once, under --out, and used by one command at a time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .options import UsageError

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]


def check_name(name: str) -> None:
    """A run's folder lies in --out itself."""
    if not name.isprintable() or name.strip() in ("", ".", "..") or any(separator in name for separator in "/\\:"):
        raise UsageError(f"--name must be the name of a folder under --out, got {name!r}")


# what a run leaves and a new one of the same name would write over, or pretrained weights that it would take up
_LEFT = ("checkpoint*.safetensors", "model*.safetensors", "pretrained.safetensors", "metrics.jsonl", "results.json")


def check_new(folder: Path) -> None:
    """Refuse a folder that holds a run."""
    if (folder / "config.json").exists():
        raise UsageError(f"run {folder} exists: add --resume to go on with it, or choose another --name")


def _check_empty(folder: Path) -> None:
    """Refuse a folder that holds what is left of a run, which nobody else is writing."""
    if left := [path.name for pattern in _LEFT for path in sorted(folder.glob(pattern))]:
        raise UsageError(
            f"{folder} holds {', '.join(left)} of a run without its config.json, which a new run would write over: "
            "move them, or choose another --name"
        )


@contextlib.contextmanager
def taken(out: Path, name: str | None, base: str, resume: bool) -> Iterator[Path]:
    """The run's folder, new (`base`, or with a number, where there is no name) or that of `name`; no other command
    has it meanwhile, and what one that was killed has left half-written is gone."""
    folder = out / (name or base)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if name is not None:
            folder.mkdir(exist_ok=True)
        else:
            folder = _made_new(out, base)
    except OSError as error:
        raise UsageError(f"the run's folder {folder} cannot be made ({error.strerror})") from None
    with _lock(folder):
        if name is not None and not resume:
            check_new(folder)  # another command may have been faster
            _check_empty(folder)
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield folder


def _made_new(out: Path, base: str) -> Path:
    number = 1
    while True:
        folder = out / (f"{base}-{number}" if number > 1 else base)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """On the folder itself: no file is left, and the system takes it off when the process ends, however it does."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"run {folder} is in use by another command: wait for it, or choose another --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
