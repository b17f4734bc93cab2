"""Every CUDA source compiles for every architecture of the wheels, without spills, within the shared memory limits."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*/cuda/*.cu"))
WHEELS = re.search(r'^CUDA_ARCHS = "([\da;]+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1].split(";")
# Without LGKERNELS_TEST_ALL=1: sm_89 has sm_86's instructions, registers and shared memory, and is left out; sm_86 and
# sm_90a are assembled from the code of compute_80, sm_120 from that of compute_100, which is their own, since no source
# asks for the architecture.
ALL = os.environ.get("LGKERNELS_TEST_ALL") == "1"
ARCHITECTURES = [a for a in WHEELS if a != "89" or ALL]
VIRTUAL = {} if ALL else {"86": "80", "90a": "80", "120": "100"}
SHARED_LIMIT = 48 * 1024  # static and dynamic together; the dynamic part: tests/lls/test_launches.py
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compile_report(source, out, architectures=ARCHITECTURES):
    """{(architecture, kernel): {"stack", "spill", "shared", "registers"}} from the assembler's own report."""
    targets = [f"-gencode=arch=compute_{VIRTUAL.get(a, a)},code=sm_{a}" for a in architectures]
    result = subprocess.run(
        [
            NVCC,
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Werror",
            "all-warnings",
            f"-I{ROOT / 'csrc'}",
            *targets,
            "--threads",
            str(min(2, os.cpu_count())),
            "-Xptxas",
            "-v",
            "-c",
            str(source),
            "-o",
            str(out),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = {}
    for part in re.split(r"Compiling entry function ", result.stdout + result.stderr)[1:]:
        kernel, architecture = re.match(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        report[architecture, kernel] = dict(
            stack=stack,
            spill=stores + loads,
            shared=int(shared[1]) if shared else 0,
            registers=int(re.search(r"Used (\d+) registers", part)[1]),
        )
    return report


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_compiles_for_every_architecture(source, tmp_path):
    report = compile_report(source, tmp_path / "object.o")
    kernels = {kernel for _, kernel in report}
    assert kernels and {a for a, _ in report} == set(ARCHITECTURES)
    assert len(report) == len(kernels) * len(ARCHITECTURES)
    for (architecture, kernel), use in report.items():
        where = f"{kernel} on sm_{architecture}: {use}"
        assert use["spill"] == 0 and use["stack"] == 0, f"spills: {where}"
        assert use["shared"] <= SHARED_LIMIT, f"static shared memory: {where}"
        assert use["registers"] <= 128, f"fewer than two blocks of 256 threads fit a multiprocessor: {where}"


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
    (use,) = compile_report(source, tmp_path / "object.o", ["86"]).values()
    assert use["spill"] > 0
