"""The authors' losses (tests/golden/local_fg) on the GPU backends: Triton interpreted, CUDA C++ on the executor."""

import pytest
import torch

from tests.forward_gradient import test_golden as golden
from tests.simt import executor

pytestmark = pytest.mark.parametrize("backend", ["triton", "cuda-simt"], indirect=True)


def in_every_order(impl, test, *arguments):
    """The CUDA kernels in every order of threads."""
    simt = executor.module() if impl == "cuda" else None
    try:
        for order in executor.ORDERS if simt else (None,):
            if simt:
                simt.set_order(order)
            test(*arguments, torch.float32)
    finally:
        if simt:
            simt.set_order("ascending")


@pytest.mark.parametrize("name", golden.CROSS_ENTROPY + golden.NT_XENT)
def test_golden(name, backend, impl, monkeypatch):
    """Values and JVPs, VJPs of constant and of any cotangents."""
    monkeypatch.setenv("LGKERNELS_IMPL", impl)
    kind = "cross_entropy" if name in golden.CROSS_ENTROPY else "nt_xent"
    in_every_order(impl, getattr(golden, f"test_{kind}"), name)
    for cotangents in ("const", "ct"):
        in_every_order(impl, getattr(golden, f"test_{kind}_backward"), name, cotangents)
