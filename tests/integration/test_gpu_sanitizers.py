"""NVIDIA's compute-sanitizer over every kernel on small cases: accesses out of bounds, races in shared memory.
(tests/simt/test_sanitizers.py runs the CUDA C++ kernels under ASan and UBSan, without a device.)"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support.gpu import backend, on_the_device  # noqa: F401

ROOT = pathlib.Path(__file__).parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("checker", ["memcheck", "racecheck"])
def test_no_kernel_is_at_fault(backend, checker):
    if backend == "reference":
        pytest.skip("plain torch has no kernels of ours")
    # Without the allocator's cache each tensor has its own allocation, and a step beyond it shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        TOOL,
        "--tool",
        checker,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.support.sanitized",
        backend,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
