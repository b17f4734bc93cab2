"""Plugin of bench/gpu_check.py: `--outcomes FILE` appends a JSON line for each test as it begins, and as it ends.

A run that is killed, or a process that crashes, so loses nothing. Tests that have ended by the first `--known N` lines
of FILE are not run again; the lines that come while processes start would divide their selections.
After a failure that broke the CUDA context, a process of several ends: the next one's tests are not to blame.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

RUNNING, PASSED, FAILED, SKIPPED, UNFINISHED = "running", "passed", "failed", "skipped", "unfinished"


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="append what becomes of each test to this file")
    parser.addoption("--known", type=int, default=0, metavar="N", help="of these first lines nothing is run again")


def pytest_configure(config):
    path = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(
            Writer(path.resolve(), config.getoption("--known"), hasattr(config, "workerinput"))
        )


def read(path, lines=None):
    """{test: its last line} of the file; a line that was cut off counts for nothing."""
    found = {}
    for line in path.read_text().splitlines()[:lines] if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["test"]] = record
    return found


def append(path, record):
    """One write: the lines of several processes do not mix."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def end_line(path):
    """After a line that was cut off, the next one begins anew."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


class Writer:
    def __init__(self, path, known, is_worker):
        self.path, self.is_worker = path, is_worker
        self.done = {name for name, r in read(path, known).items() if r["state"] in (PASSED, FAILED, SKIPPED)}
        self.now = None

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if item.nodeid in self.done]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self.done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        of = {name: [v for n, v in item.user_properties if n == name] for name in ("op", "backend", "kind")}
        self.now = {"test": item.nodeid, "ops": of["op"], "backend": (of["backend"] or [None])[0]}
        self.now["kind"] = (of["kind"] or ["test"])[0]
        began = time.time()
        append(self.path, {**self.now, "state": RUNNING, "at": began, "pid": os.getpid()})
        self.now |= {"state": PASSED, "why": ""}
        result = yield
        append(self.path, {**self.now, "seconds": round(time.time() - began, 3)})
        if self.now["state"] == FAILED and self.is_worker and _context_is_broken():
            os._exit(3)  # pytest-xdist starts another
        return result

    def pytest_runtest_logreport(self, report):
        if self.now is None or report.nodeid != self.now["test"] or self.now["state"] == FAILED:
            return
        if report.failed:
            text = report.longreprtext.strip().splitlines() or [""]
            said = [line[1:].strip() for line in text if line.startswith("E  ")]
            self.now |= {"state": FAILED, "why": (said or text[-1:])[0][:300]}
        elif report.skipped and not hasattr(report, "wasxfail"):
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.now |= {"state": SKIPPED, "why": why[:300]}


def _context_is_broken():
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
