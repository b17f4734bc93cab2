"""Fixtures of the tests on a CUDA device, test_gpu*.py: `python -m pytest --gpu`."""

import pytest
import torch

from tests.support import problems


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request):
    from lgkernels.core import dispatch

    reason = dispatch.unavailable("lls_loss", request.param, torch.device("cuda"), torch.float32)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """Backends get their tensors there; truth and bound are still computed on the CPU, by the reference."""
    monkeypatch.setattr(problems, "DEVICE", "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
