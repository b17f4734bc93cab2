"""Fixtures of the tests on a CUDA device, test_gpu*.py: `python -m pytest --gpu`.

With LGKERNELS_STAND_IN=cpu (a dry run of bench/gpu_check.py) Triton's interpreter and the CPU executor take its place.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import running
from tests.support import problems

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("LGKERNELS_STAND_IN") or "cuda"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.fixture(params=["reference", "torch", "triton", "cuda"])
def backend(request):
    from lgkernels.core import dispatch

    if DEVICE != "cuda":
        with running({"cuda": "cuda-simt"}.get(request.param, request.param)):
            yield request.param
        return
    reason = dispatch.unavailable("lls_loss", request.param, torch.device("cuda"), torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    yield request.param


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """Backends get their tensors there; truth and bound are still computed on the CPU, by the reference."""
    monkeypatch.setattr(problems, "DEVICE", DEVICE)
    if DEVICE != "cuda":
        return
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.sanitizer
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("checker", ["memcheck", "racecheck"])
def test_no_kernel_is_at_fault(request, backend, checker):
    """NVIDIA's compute-sanitizer over every kernel of the importing file's family on small cases: accesses out of
    bounds, races in shared memory. (tests/simt/test_sanitizers.py: under ASan and UBSan, without a device.)"""
    if backend in ("reference", "torch"):
        pytest.skip("plain torch has no kernels of ours")
    # Without the allocator's cache each tensor has its own allocation, and a step beyond it shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    tool = [SANITIZER, "--tool", checker, "--report-api-errors", "no", "--error-exitcode", "9"]
    kernels = [sys.executable, "-m", "tests.support.sanitized", backend, request.path.parent.name]
    result = subprocess.run([*tool, *kernels], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
