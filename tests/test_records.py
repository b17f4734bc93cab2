"""The file of verdicts: shared by processes and users, cheap to add to, and without what has become old."""

import json
import os
import time

import pytest

from lgkernels.core import records, verdicts

ABOUT = {"gpu": "one"}


def made(path, about=ABOUT, is_stale=lambda about, days: False):
    return records.Records(path, about, is_stale)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "verdicts-1.jsonl"


def test_a_note_adds_a_line_and_rewrites_nothing(path, monkeypatch):
    store = made(path)
    store.put("first", {"state": "good"})
    before = path.read_bytes(), path.stat().st_ino
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("written whole"))
    store.put("second", {"state": "good"})
    assert path.read_bytes().startswith(before[0]) and path.stat().st_ino == before[1]
    assert len(path.read_bytes()) < len(before[0]) + 60
    assert made(path).entries == {"first": {"state": "good"}, "second": {"state": "good"}}


def test_what_others_have_added_is_read_and_nothing_twice(path, monkeypatch):
    mine, theirs = made(path), made(path)
    mine.put("a", {"n": 1})
    mine.read()
    theirs.put("b", {"n": 2})
    read, loads = [], json.loads
    monkeypatch.setattr(records.json, "loads", lambda line: read.append(line) or loads(line))
    mine.read()
    assert mine.entries == {"a": {"n": 1}, "b": {"n": 2}}
    assert sum(b'"key"' in line for line in read) == 1, "b alone"


def test_a_record_is_removed_for_all(path):
    mine, theirs = made(path), made(path)
    mine.put("a", {"n": 1})
    theirs.put("a", {})
    mine.read()
    assert not mine.entries and not theirs.entries and not made(path).entries


def test_a_file_does_not_grow_without_end(path):
    mine, theirs = made(path), made(path)
    theirs.put("theirs", {"n": 1})
    for n in range(3 * records._OLD_LINES):
        mine.put("a", {"n": n})
    assert len(path.read_text().splitlines()) < 3 * records._OLD_LINES
    theirs.put("more", {"n": 2})
    assert made(path).entries == theirs.entries
    assert theirs.entries == {"theirs": {"n": 1}, "a": {"n": n}, "more": {"n": 2}}
    assert [p.name for p in sorted(path.parent.iterdir())] == ["lock", path.name]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_as_open_to_others_as_the_user_wants(path, umask, mode):
    before = os.umask(umask)
    try:
        made(path).put("a", {"n": 1})
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {
        "lock": oct(mode),
        path.name: oct(mode),
    }


def test_a_file_of_another_user_is_replaced(path, monkeypatch):
    made(path).put("theirs", {"n": 1})

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(records, "_append", refused)  # root may write to any file
    made(path).put("mine", {"n": 2})
    assert made(path).entries == {"theirs": {"n": 1}, "mine": {"n": 2}}


def test_a_line_that_is_being_written_is_read_when_it_has_ended(path):
    reader = made(path)
    made(path).put("a", {"n": 1})
    line = b'{"key": "b", "n": 2}\n'
    for part in (line[:9], line[9:]):
        with open(path, "ab") as file:
            file.write(part)
        reader.read()
    assert reader.entries == {"a": {"n": 1}, "b": {"n": 2}}


def test_clear_removes_the_file(path):
    made(path).put("a", {"n": 1})
    assert made(path).clear() == 1 and not path.exists()
    assert made(path).clear() == 0


# -- old files ---------------------------------------------------------------------------------------------------------


def age(path, days):
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LGKERNELS_CACHE_DIR", str(tmp_path))
    return tmp_path


def noted(monkeypatch, **versions):
    """The file of a process with these versions, which has noted a verdict."""
    fingerprint = {"gpu": "one", "driver": "1", "torch": "2", "triton": "3", "sources": "4", **versions}
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "fingerprint", lambda device: fingerprint)
        store = verdicts.Verdicts("device")
        store.note("a", verdicts.GOOD, "a")
    return store.path


@pytest.mark.parametrize(
    "versions, days, stays",
    [
        ({"driver": "0"}, 91, False),
        ({"driver": "0"}, 89, True),
        ({"sources": "0"}, 8, False),
        ({"sources": "0"}, 6, True),
        ({"sources": "0", "torch": "0"}, 8, True),
        ({"gpu": "another"}, 91, True),
    ],
    ids=str,
)
def test_old_files_of_this_device_go(folder, monkeypatch, versions, days, stays):
    old = noted(monkeypatch, **versions)
    age(old, days)
    new = noted(monkeypatch)
    assert old.exists() == stays and new.exists()


def test_what_has_no_head_goes_too(folder, monkeypatch):
    for name, days in (("verdicts-1.json", 91), ("verdicts-1.lock", 91), ("verdicts-2.tmp", 2), ("mine.jsonl", 91)):
        (folder / name).write_text("{\n")
        age(folder / name, days)
    (folder / "verdicts-3.json").write_text("{\n")
    new = noted(monkeypatch)
    assert {path.name for path in folder.iterdir()} == {"lock", "mine.jsonl", "verdicts-3.json", new.name}


def test_a_file_that_is_only_read_is_in_use(folder, monkeypatch):
    path = noted(monkeypatch)
    age(path, 80)
    made(path)
    assert records._days_unused(path) < 1
