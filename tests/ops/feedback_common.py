"""Shared by the tests of the family `feedback`."""
import importlib.util

import pytest
import torch

from tests.cases import generator


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def kernels_are_there(request):
    if "backend" in request.fixturenames:
        module = {"triton": "triton_kernels", "cuda-simt": "cuda"}.get(request.getfixturevalue("backend"),
                                                                     request.getfixturevalue("backend"))
        if importlib.util.find_spec(f"lgkernels.ops.feedback.{module}") is None:
            pytest.skip(f"lgkernels.ops.feedback.{module} is not written yet")
