"""Every shipped configuration of every Triton kernel compiles ahead of time for the six architectures, with no GPU.

A process of its own, without TRITON_INTERPRET, does the compiling (see aot.py); here its lines are judged.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgkernels.core import tiles
from tests.support.once import made_once

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _families():
    return importlib.import_module("tests.static.aot").families()  # needs triton


@pytest.fixture(scope="module", params=sorted(tiles.SHARED_MEMORY), ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    """`(arch, results)`: one dict for each distinct specialisation; compiled once, also for several test processes."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    archs = sorted({str(params["compiled"]) for params in calls if "compiled" in params}, key=int)

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


def _offenders(results, wrong):
    measured = ("shared", "registers", "stack", "error")
    return [(r["kernel"], r["options"], r["constants"], {k: r.get(k) for k in measured}) for r in results if wrong(r)]


def test_compiles_within_the_limits(compiled):
    arch, results = compiled
    assert len(results) > 90
    assert not _offenders(results, lambda r: "error" in r)
    assert not _offenders(results, lambda r: r["shared"] > tiles.SHARED_MEMORY[arch])
    assert not _offenders(results, lambda r: r["stack"] > 0), "registers spill to the stack"


def test_matrix_products_use_matrix_instructions(compiled):
    _, results = compiled
    wanted = set().union(*(family.MATRIX_KERNELS for family in _families()))
    assert wanted <= {r["kernel"] for r in results if r["dot"]}
    assert not _offenders(results, lambda r: r["dot"] and not r["matrix_instruction"])


def test_every_row_of_the_tables_is_compiled(compiled):
    _, results = compiled
    for kernel, (table, names) in (item for family in _families() for item in family.TABLES.items()):
        seen = {tuple(r["constants"][name] for name in names) for r in results if r["kernel"] == kernel}
        missing = {row[:3] for row in table} - seen
        assert not missing, f"{kernel}: no case of tests/<family>/aot.py selects {missing}"


def test_large_tiles_load_sixteen_bytes_at_a_time(compiled):
    """The elementwise passes at VGG8 sizes in half precision; a lost alignment hint shows here, and nowhere else."""
    _, results = compiled
    passes = [
        r
        for r in results
        if r["kernel"] in ("norm_act_pool_kernel", "grad_preactivation_kernel")
        and "*bf16" in r["types"]
        and r["constants"].get("NORM", True)  # without NORM only latents are stored
        and r["constants"]["BLOCK_P"] * r["constants"]["BLOCK_C"] == 2048
    ]
    layouts = {(r["kernel"], r["constants"]["CHANNELS_LAST"]) for r in passes}
    assert len(layouts) == 4
    assert not _offenders(passes, lambda r: not r["wide"])


def test_local_passes_load_sixteen_bytes_at_a_time(compiled):
    """Passes over feature maps whose planes are aligned, and the optimizer step, whose addresses come from a table."""
    _, results = compiled
    passes = [r for r in results if r["kernel"] in ("scale_kernel", "offset_sgd_kernel")]
    assert len(passes) == 5
    assert not _offenders(passes, lambda r: not r["wide"])
