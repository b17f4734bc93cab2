"""Every CUDA source compiles for every architecture of the wheels, without spills, within the shared memory limits."""

import importlib.util
import json
import subprocess

import pytest

from tests.support.once import made_once

from . import sass
from .nvcc import ARCHITECTURES, MORE, NVCC, ROOT, SOURCES, compile_source, generic, rows, version

SHARED_LIMIT = 48 * 1024  # static and dynamic together; the dynamic part: tests/lls/test_launches.py
TABLE = ROOT / "bench/results/cuda-machine-code-after.txt"

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def built(request, tmp_path_factory):
    """A source, its report by (architecture, kernel), and the folder with its PTX and machine code."""
    source = request.param

    def compile_into(folder):
        folder.mkdir()
        report = [(*key, use) for key, use in compile_source(source, folder).items()]
        (folder / "report.json").write_text(json.dumps(report))

    folder = made_once(tmp_path_factory, f"{source.parts[-3]}-{source.stem}", compile_into)
    report = json.loads((folder / "report.json").read_text())
    return source, {(architecture, kernel): use for architecture, kernel, use in report}, folder


def test_compiles_for_every_architecture(built):
    _, report, _ = built
    kernels = {kernel for _, kernel in report}
    assert kernels and {a for a, _ in report} == set(ARCHITECTURES)
    assert len(report) == len(kernels) * len(ARCHITECTURES)
    for (architecture, kernel), use in report.items():
        where = f"{kernel} on sm_{architecture}: {use}"
        assert use["spill"] == 0 and use["stack"] == 0, f"spills: {where}"
        assert use["shared"] <= SHARED_LIMIT, f"static shared memory: {where}"
        assert use["registers"] <= 128, f"fewer than two blocks of 256 threads fit a multiprocessor: {where}"


def test_every_load_and_store_names_its_memory(built):
    """Global or shared: one that could be either is slower, and its address takes the cache of neither."""
    _, _, folder = built
    files = list(folder.glob("*.ptx"))
    assert len(files) >= 3
    for file in files:
        assert not generic(file.read_text()), file.name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton, which has nvdisasm, is not installed")
def test_the_committed_table_is_of_these_kernels(built):
    """Made anew by `python -m tests.static.nvcc`, with the nvcc that its first line names."""
    source, report, folder = built
    found = rows(source, report, folder)
    assert not [row["kernel"] for row in found if row["double"] or row["generic"]]
    title, _, _, *kept = TABLE.read_text().splitlines()
    _, *lines = sass.table(found, MORE).splitlines()
    names = {line.split()[0] for line in lines}
    assert names and names <= {line.split()[0] for line in kept}
    if title.startswith(f"nvcc {version()};"):
        assert [line.split() for line in lines] == [line.split() for line in kept if line.split()[0] in names]


def test_no_source_asks_for_the_architecture():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    texts = {path: path.read_text().replace("defined(__CUDA_ARCH__)", "") for path in files}
    assert len(texts) > 50 and not [path for path, text in texts.items() if "__CUDA_ARCH__" in text]


def test_architectures_share_their_code():
    """What VIRTUAL rests on, in a source that takes every dtype and multiplies."""

    def code(architecture):
        command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-ptx", "-o", "-"]
        source = [f"-arch=compute_{architecture}", str(ROOT / "csrc/feedback/cuda/product.cu")]
        made = subprocess.run([*command, *source], capture_output=True, text=True, check=True)
        return [line for line in made.stdout.splitlines() if line and not line.startswith((".target", "//"))]

    made = {architecture: code(architecture) for architecture in ("75", "80", "86", "90a", "100", "120")}
    assert made["80"] == made["86"] == made["90a"] and made["100"] == made["120"]
    assert made["75"] != made["80"] != made["100"] and len(made["80"]) > 1000


def test_a_spill_is_seen(tmp_path):
    """128 values live across a barrier do not fit the 64 registers that 1024 threads leave to each."""
    source = tmp_path / "spill.cu"
    source.write_text("""
        __global__ void __launch_bounds__(1024, 1) spill(float* x) {
          float v[128];
        #pragma unroll
          for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[127 - i] * v[i];
        }""")
    (use,) = compile_source(source, tmp_path, ["86"]).values()
    assert use["spill"] > 0


def test_a_generic_load_is_seen(tmp_path):
    """A pointer to what may be shared memory, or global."""
    source = tmp_path / "generic.cu"
    source.write_text("""
        __global__ void either(float* x, float* y, bool shared) {
          __shared__ float own[32];
          own[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          const float* from = shared ? own : x;
          y[threadIdx.x] = from[31 - threadIdx.x];
        }""")
    (symbol,) = {kernel for _, kernel in compile_source(source, tmp_path, ["86"])}
    (ptx,) = tmp_path.glob("*.ptx")
    assert "either" in symbol and generic(ptx.read_text()) == ["ld.f32"]
