"""The cached launcher of the Triton kernels, with Triton's driver replaced (tests/support/launched.py)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    def run(path):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_DEBUG")}
        command = [sys.executable, "-m", "tests.support.launched"]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-4000:]
        path.write_text(found.stdout.splitlines()[-1])

    return json.loads(made_once(tmp_path_factory, "launched.json", run).read_text())


def test_what_is_launched_is_what_triton_would_choose(launched):
    """Kernel, grid, stream and arguments, at the first launch and at a remembered one, over all kernels of all
    families, and with every argument and constant changed to what another specialisation is for."""
    assert launched["faults"] == []
    assert launched["compared"] > 5000


def test_all_kernels_take_part(launched):
    source = "\n".join(path.read_text() for path in (ROOT / "lgkernels").glob("ops/*/triton*.py"))
    started = set(re.findall(r"\n@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", source))
    assert started and set(launched["kernels"]) == started


def test_whoever_watches_launches_sees_them(launched):
    """A profiler's hooks and debug mode, and a Triton whose compiled kernels are others: its own path, every time."""
    asked = dict(launched["asked"])
    assert asked.pop("nothing") == 0
    assert asked and set(asked.values()) == {3}


def test_a_remembered_launch_runs_little_python(launched):
    """`launch`, `start`, Triton's look-up of its driver; device, stream and kernel of the stand-in."""
    assert launched["calls"] <= 6


def test_the_bench_of_host_costs_runs():
    run = subprocess.run([sys.executable, "-m", "bench.host", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"all 5 launches of a fused forward", "look-up of the verdict of lls_block"} <= {row["what"] for row in rows}


def test_each_device_has_its_own(launched):
    assert launched["devices"] == {"compiled": [0, 1], "asked": [1, 1, 0, 0], "current": 0}
