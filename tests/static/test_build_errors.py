"""What setup.py says of a build that failed: one line, and the right one; and what it builds for."""

import runpy
from pathlib import Path
from unittest import mock

import pytest

from lgkernels.core import tiles

ROOT = Path(__file__).resolve().parents[2]

BROKEN_COMPILER = """-- The CXX compiler identification is GNU 12.2.0
CMake Error at /usr/share/cmake/Modules/CMakeDetermineCompilerId.cmake:9 (message):
  Compiling the CUDA compiler identification source file
  "CMakeCUDACompilerId.cu" failed.

  Compiler: /usr/local/cuda/bin/nvcc
Call Stack (most recent call first):
  CMakeLists.txt:87 (enable_language)
-- Configuring incomplete, errors occurred!
"""


@pytest.fixture(scope="module")
def setup():
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "log, said",
    [
        (
            BROKEN_COMPILER,
            'Compiling the CUDA compiler identification source file "CMakeCUDACompilerId.cu" failed. '
            "Compiler: /usr/local/cuda/bin/nvcc",
        ),
        ("CMake Error: the source is not there\nmore\n", "the source is not there"),
        ("-- error: no nvcc found\nCMake Error at CMakeLists.txt:1 (message):\n  x\n", "no nvcc found"),
        ("CMake Error at a:1 (message):\n  not this\n\nkernel.cu(3): error: this\n", "kernel.cu(3): error: this"),
        ("nothing\n", "CMake failed"),
    ],
)
def test_the_line_that_tells_most(setup, tmp_path, log, said):
    path = tmp_path / "build.log"
    path.write_text(log)
    assert setup["first_error"](path) == said


def test_all_architectures_are_those_of_the_triton_kernels_tables(setup):
    assert [int(name.rstrip("a")) for name in setup["CUDA_ARCHS"].split(";")] == sorted(tiles.SHARED_MEMORY)
