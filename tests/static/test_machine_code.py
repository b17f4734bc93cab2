"""What the compiled Triton kernels execute: no double precision, and sums over lanes whose halves agree."""

import importlib.util
import math
from pathlib import Path

import pytest

from . import sass

TABLE = Path(__file__).parents[2] / "bench/results/triton-machine-code-after.txt"
ONE_LANE = """
        /*0000*/                   FMUL R2, R0, R1 ;
        /*0010*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*0020*/              @!P0 {0} ;
        /*0030*/                   STG.E.64 [R8.64], R4 ;
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _named(results):
    return [(r["kernel"], r["options"], r["constants"]) for r in results]


@needs_triton
def test_no_kernel_computes_in_double_precision(compiled):
    _, results = compiled
    assert not _named(r for r in results if r["double_precision"])


@needs_triton
@pytest.mark.parametrize("compiled", [86], indirect=True, ids=lambda arch: f"sm_{arch}")
def test_sums_over_lanes_add_rounded_values(compiled):
    _, results = compiled
    assert not _named(r for r in results if r["fused_into_lanes"])
    assert not _named(r for r in results if r["double"] or r["generic"])


@needs_triton
@pytest.mark.parametrize("compiled", [86], indirect=True, ids=lambda arch: f"sm_{arch}")
def test_max_pooling_of_exact_bins_loads_whole_runs(compiled):
    """Of NCHW maps: 16 bytes of both rows of the windows at a time, none by element."""
    _, results = compiled
    pools = [r for r in results if r["constants"].get("WINDOW") == 2 and r["constants"]["RUN"] == 8]
    assert {"*bf16" in r["types"] for r in pools} == {True, False}
    assert all(r["loads"][0] >= 2 and not sum(r["loads"][3:]) and not r["stores"][3] for r in pools)


@needs_triton
@pytest.mark.parametrize("compiled", [86], indirect=True, ids=lambda arch: f"sm_{arch}")
def test_reductions_of_the_local_losses_have_loads_in_flight(compiled):
    """Of a plane of many tiles four at least; a thread has eight values of a tile, one load or two."""
    _, results = compiled
    reductions = [r for r in results if r["constants"].get("LOADS") == 4]
    assert {r["kernel"] for r in reductions} == {"sums_kernel", "deviation_kernel"}
    assert {r["constants"]["CHANNELS_LAST"] for r in reductions} == {True, False}
    assert all(r["in_flight"] >= 4 for r in reductions)


@needs_triton
@pytest.mark.parametrize("compiled", [86], indirect=True, ids=lambda arch: f"sm_{arch}")
def test_a_head_of_many_classes_takes_few_instructions(compiled):
    """100 classes at batch 128: at most two a product and thread, on matrix instructions. Plain arithmetic takes 13 and
    24 (the loops of wide_head_kernel)."""
    from lgkernels.ops.lls.triton_fused_head import fused_kernel

    assert fused_kernel(128, 2048, 100, 100) is None and fused_kernel(16, 512, 100, 100) == "wide_head"
    _, results = compiled
    blocks = ("BLOCK_M", "BLOCK_K", "BLOCK_D")
    for kernel, tile in (("similarity_kernel", (16, 64, 32)), ("latent_grad_kernel", (16, 32, 64))):
        found = [r for r in results if r["kernel"] == kernel and tuple(map(r["constants"].get, blocks)) == tile]
        assert {r["constants"]["PACKED"] for r in found} == {True, False}
        for r in found:
            assert r["matrix"] and r["loop"] * 32 * r["options"]["num_warps"] <= 2 * math.prod(tile)


@needs_triton
@pytest.mark.parametrize("compiled", [86], indirect=True, ids=lambda arch: f"sm_{arch}")
def test_the_committed_table_is_of_these_kernels(compiled):
    """Made anew by `python -m tests.static.aot --table 75 86 90 120`, with the Triton of constraints.txt."""
    import triton

    _, results = compiled
    assert all(r["instructions"] > 50 and sum(r["loads"]) and sum(r["stores"]) for r in results)
    title, _, _, *kept = TABLE.read_text().splitlines()
    _, *lines = sass.table(results).splitlines()
    assert [line.split()[0] for line in lines] == sorted({r["kernel"] for r in results})
    if title.startswith(f"Triton {triton.__version__};"):
        assert lines == [line for line in kept if line.split()[1] == "86"]


@pytest.mark.parametrize(
    "instruction, fused",
    [("FFMA R4, R0, R1, R3", 1), ("FFMA R4, R0, R3, R1", 0), ("FADD R4, R2, R3", 0), ("FFMA R4, R0, R1, R2", 0)],
)
def test_a_product_fused_into_a_sum_over_lanes_is_seen(instruction, fused):
    listing = sass.parse(ONE_LANE.format(instruction))
    assert len(listing) == 4 and sass.fused_into_lanes(listing) == fused
    assert sass.counts(listing)["stores"] == [0, 1, 0, 0, 0]


def test_an_overwritten_register_is_no_longer_the_other_lanes():
    overwritten = ONE_LANE.format("LDG.E.64 R2, [R6.64]") + "/*0040*/ FFMA R4, R0, R1, R3 ;"
    assert sass.fused_into_lanes(sass.parse(overwritten)) == 0


@pytest.mark.parametrize(
    "opcode, double",
    [("DFMA", 1), ("F2F.F64.F32", 1), ("F2F.F32.F64", 1), ("MUFU.RCP64H", 1), ("FFMA", 0), ("DEPBAR", 0)],
)
def test_double_precision_is_seen(opcode, double):
    assert sass.counts([(opcode, "R0, R2")])["double"] == double


IN_FLIGHT = [
    ("LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R0, R4", "FADD R0, R0, R8", 2),
    ("LDG.E.128 R4, [R2.64]", "FADD R0, R0, R7", "LDG.E.128 R4, [R2.64+0x10]", "FADD R0, R0, R5", 1),
    ("LDG.E R4, [R2.64]", "LDG.E R8, [R2.64+0x10]", "FADD R0, R0, R4", "LDG.E R5, [R2.64]", 2),
    ("LDG.E R4, [R2.64]", "@P0 BRA `(.L_1)", "LDG.E R8, [R2.64]", "STG.E [R2.64], R8", 1),
]


@pytest.mark.parametrize("first, second, third, fourth, expected", IN_FLIGHT)
def test_loads_in_flight_are_counted(first, second, third, fourth, expected):
    lines = [f"/*{i:04x}*/ {text} ;" for i, text in enumerate((first, second, third, fourth))]
    assert sass.loads_in_flight(sass.parse("\n".join(lines))) == expected


LOOPS = """
        /*0000*/                   LDG.E R4, [R2.64] ;
        /*0010*/                   FFMA R0, R4, R4, R0 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   HMMA.1688.F32.TF32 R4, R8, R9, R4 ;
        /*0040*/               @P1 BRA 0x0 ;
        /*0050*/                   BRA 0x50 ;
"""


def test_loops_and_matrix_instructions_are_counted():
    listing = sass.parse(LOOPS)
    assert sass.loops(listing) == [(1, 2)]
    row = sass.counts(listing)
    assert row["loop"] == 2 and row["matrix"] == 1
