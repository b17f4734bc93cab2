"""What the tests of compiled Triton kernels share: the kernels, compiled once in a process without TRITON_INTERPRET."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgkernels.core import tiles
from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=sorted(tiles.SHARED_MEMORY), ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    """`(arch, results)`: one dict for each distinct specialisation; compiled once, also for several test processes."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {params["compiled"] for params in calls if "compiled" in params}  # other files have such, too
    archs = [str(arch) for arch in sorted(tiles.SHARED_MEMORY) if arch in wanted]

    def compile_all(path):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LGKERNELS_IMPL")}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, "-m", "tests.static.aot", *archs]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        path.write_text(run.stdout)

    lines = made_once(tmp_path_factory, "aot.jsonl", compile_all)
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    return request.param, [r for r in results if r["arch"] == request.param]
