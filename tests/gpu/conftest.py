"""tests/gpu runs the kernels on a CUDA device: `python -m pytest tests/gpu` (by itself, so that Triton compiles)."""

import os

import pytest
import torch

from tests.ops import lls_problems


def _unavailable(name):
    from lgkernels.core import dispatch

    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on: run tests/gpu by itself"
    return dispatch.unavailable("lls_loss", name, torch.device("cuda"), torch.float32)


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request):
    reason = _unavailable(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """Backends get their tensors there; truth and bound are still computed on the CPU, by the reference."""
    monkeypatch.setattr(lls_problems, "DEVICE", "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
