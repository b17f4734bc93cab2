"""Records by key in a file that processes share, and machines that share a home.

A line of JSON each, after a line that says what the file is about. The last line of a key counts; one without fields
removes it. A record is appended under a lock, after a look at what others have appended. A file that is new or damaged,
that has grown by what no longer counts, or that belongs to another user, is written whole, what others wrote merged in,
and put in place by `os.replace`.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_OLD_LINES = 256  # that no longer count, before a file is written anew
_DAY = 86_400.0


class Records:
    """`path` becomes None where nothing can be written: then memory serves this process."""

    def __init__(self, path: Path | None, about: dict[str, str], is_stale: Callable[[Any, float], bool]) -> None:
        """`is_stale(what it is about, days unused)`: whether a file beside this one may go."""
        self.path, self.about, self._is_stale = path, about, is_stale
        self.entries: dict[str, Any] = {}
        self._start_over(b"")
        self.read()
        if path is not None and _days_unused(path) > 1:
            with contextlib.suppress(OSError):
                os.utime(path)  # what is only read is in use as well

    def _start_over(self, head: bytes) -> None:
        self._head, self._end, self._lines, self.entries = head, len(head), 0, {}

    def read(self) -> None:
        """Take over what was written since the last look. A damaged file counts as empty, a damaged line as none."""
        if self.path is None:
            return
        try:
            with open(self.path, "rb") as file:
                head = file.readline()  # of a file that was written anew another one: it has a random number
                if head != self._head:
                    self._start_over(head)
                file.seek(self._end)
                new = file.read()
        except FileNotFoundError:
            return self._start_over(b"")
        except OSError:
            return
        new = new[: new.rfind(b"\n") + 1]  # the rest is being written
        self._end += len(new)
        for line in new.splitlines() if self._is_sound() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                record = json.loads(line)
                self._take(record.pop("key"), record)
                self._lines += 1

    def put(self, key: str, fields: dict, replace: bool = True) -> None:
        """Note the record of a key; without fields: that there is none. `replace=False`: what others have written of
        the key in the meantime stays, and is what `entries` then holds."""

        def write(path: Path) -> None:
            self.read()
            if not replace and key in self.entries:
                return
            self._take(key, fields)
            if self._is_sound() and self._lines < 2 * len(self.entries) + _OLD_LINES:
                with contextlib.suppress(PermissionError):  # the file is another user's, the folder ours too
                    return _append(path, key, fields)
            if not self._head:
                self._remove_stale(path)
            self._write_whole(path)

        if replace:
            self._take(key, fields)
        self._writing(write)
        if key not in self.entries:  # nothing can be written
            self._take(key, fields)

    def clear(self) -> int:
        """Remove all records, and the file. Returns how many there were."""
        self.read()
        number = len(self.entries)
        self._start_over(b"")
        self._writing(lambda path: path.unlink(missing_ok=True))
        return number

    def _is_sound(self) -> bool:
        return _about(self._head) == self.about

    def _take(self, key: str, fields: dict) -> None:
        if fields:
            self.entries[key] = fields
        else:
            self.entries.pop(key, None)

    def _writing(self, write: Callable[[Path], None]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent / "lock"):
                write(self.path)
        except OSError:  # a read-only home, a full disk
            self.path = None

    def _write_whole(self, path: Path) -> None:
        lines: list[dict] = [{"about": self.about, "number": secrets.token_hex(8)}]
        lines += [{"key": key, **fields} for key, fields in self.entries.items()]
        temporary = path.with_name(f"{path.stem}-{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "x") as file:  # as the umask says: users may share a folder
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _remove_stale(self, path: Path) -> None:
        """A new file comes with a new driver, version or source: the moment when others have become old."""
        for other in path.parent.glob(f"{path.name.partition('-')[0]}-*"):
            with contextlib.suppress(OSError), open(other, "rb") as file:
                about = _about(file.readline())
                days = _days_unused(other)  # after the look: somebody may have touched it since
                # a .tmp is what a process left that was killed while it wrote
                if days > 1 if other.suffix == ".tmp" else self._is_stale(about, days):
                    other.unlink()


def _append(path: Path, key: str, fields: dict) -> None:
    with open(path, "ab", buffering=0) as file:
        # a break before it as well: somebody's line may have ended in the middle
        file.write(b"\n" + json.dumps({"key": key, **fields}).encode() + b"\n")


def _about(head: bytes) -> Any:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(head)["about"]
    return None


def _days_unused(path: Path) -> float:
    try:
        return (time.time() - path.stat().st_mtime) / _DAY
    except OSError:
        return 0.0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the file system has locks; without them a record may be lost, and is found again."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # made by another user
        lock = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
