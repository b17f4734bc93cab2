"""Every shipped configuration of every Triton kernel compiles ahead of time for every architecture, with no GPU.

The fixture's process does the compiling (conftest.py, aot.py); here its lines are judged.
"""

import importlib
import importlib.util

import pytest

from lgkernels.core import tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _families():
    return importlib.import_module("tests.static.aot").families()  # needs triton


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
    arch, results = compiled
    # a kernel whose table is empty for an architecture is not used there
    unused = {name for family in _families() for name, (table, _) in family.TABLES.items() if not table(arch)}
    assert not unused & {r["kernel"] for r in results}
    wanted = set().union(*(family.MATRIX_KERNELS for family in _families())) - unused
    assert wanted <= {r["kernel"] for r in results if r["dot"]}
    used = arch >= tiles.MATRIX_INSTRUCTIONS_FROM
    assert not _offenders(results, lambda r: r["dot"] and bool(r["matrix_instruction"]) != used)


def test_every_row_of_the_tables_is_compiled(compiled):
    arch, results = compiled
    for kernel, (table, names) in (item for family in _families() for item in family.TABLES.items()):
        seen = {tuple(r["constants"][name] for name in names) for r in results if r["kernel"] == kernel}
        missing = {row[:3] for row in table(arch)} - seen
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
