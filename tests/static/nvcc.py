"""The CUDA sources, compiled without a GPU: `python -m tests.static.nvcc` prints the table of their machine code.

Needs nvcc, and for the table the disassembler that Triton brings along.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import sass

ROOT = Path(__file__).parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
SOURCES = sorted((ROOT / "csrc").glob("*/cuda/*.cu"))
WHEELS = re.search(r'^CUDA_ARCHS = "([\da;]+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1].split(";")
# Without LGKERNELS_TEST_ALL=1: sm_89 has sm_86's instructions, registers and shared memory, and is left out; sm_86 and
# sm_90a are assembled from the code of compute_80, sm_120 from that of compute_100, which is their own, since no source
# asks for the architecture.
ALL = os.environ.get("LGKERNELS_TEST_ALL") == "1"
ARCHITECTURES = [a for a in WHEELS if a != "89" or ALL]
VIRTUAL = {} if ALL else {"86": "80", "90a": "80", "120": "100"}
MORE = ("loop", "generic")  # columns of the table
_GENERIC = re.compile(r"\b(?:ld|st)(?:\.volatile|\.relaxed|\.cg|\.cs)*\.(?:v\d\.)?[bfsu]\d+\b")


def compile_source(source, folder, architectures=ARCHITECTURES):
    """{(architecture, kernel): {"stack", "spill", "shared", "registers"}} from the assembler's own report; the object,
    and what led to it, lie in `folder` then."""
    targets = [f"-gencode=arch=compute_{VIRTUAL.get(a, a)},code=sm_{a}" for a in architectures]
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}"]
    threads = ["--threads", str(min(2, os.cpu_count()))]
    kept = ["--keep", "--keep-dir", str(folder), "-Xptxas", "-v"]
    command = [NVCC, *options, *targets, *threads, *kept, "-c", str(source), "-o", str(Path(folder, "object.o"))]
    result = subprocess.run(command, capture_output=True, text=True)
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


def generic(ptx):
    """Loads and stores through pointers of which the compiler cannot tell what memory they are to."""
    return _GENERIC.findall(ptx)


def name_of(symbol):
    """The function's own name in a mangled one."""
    at, name = symbol.index("_ZN") + 3 if "_ZN" in symbol else symbol.index("_Z") + 2, ""
    while length := re.match(r"L?(\d+)", symbol[at:]):
        at += len(length[0])
        name, at = symbol[at : at + int(length[1])], at + int(length[1])
    return name


def disassembler():
    """Path of nvdisasm, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.knobs.nvidia.nvdisasm.path


def version():
    return re.search(r"V([\d.]+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


def rows(source, report, folder, architecture="86"):
    """Rows for `sass.table` of the kernels of a source that `compile_source` left in `folder`."""
    files = list(Path(folder).glob("*.cubin"))  # named by what tells them apart
    names = f"sm_{architecture}.cubin", f"compute_{VIRTUAL.get(architecture, architecture)}.cubin"
    (cubin,) = files if len(files) == 1 else [file for file in files if file.name.endswith(names)]
    codes = sass.codes(cubin.read_bytes())
    listings = sass.listings(disassembler(), int(architecture), codes.values(), folder)
    return [
        {"kernel": f"{source.parts[-3]}.{name_of(symbol)}", "arch": int(architecture)}
        | report[architecture, symbol]
        | sass.counts(listing)
        for symbol, listing in zip(codes, listings)
    ]


def main(architecture="86"):
    found = []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            found += rows(source, compile_source(source, folder, [architecture]), folder, architecture)
    print(f"nvcc {version()}; counts of all variants together, the largest of their resources\n")
    print(sass.table(found, MORE))


if __name__ == "__main__":
    main(*sys.argv[1:])
