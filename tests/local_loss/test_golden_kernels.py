"""The authors' numbers (tests/golden/local_loss) on the GPU backends: Triton interpreted, CUDA C++ on the executor."""

import functools

import pytest
import torch

from tests.local_loss import test_golden as golden
from tests.simt import executor

pytestmark = pytest.mark.parametrize("backend", ["triton", "cuda-simt"], indirect=True)


@pytest.mark.parametrize("name", golden.FILES["predsim"] + golden.FILES["ff_mean"] + golden.FILES["ff_sum"])
def test_golden(name, backend, impl, monkeypatch):
    """predsim: cross entropy and similarity; ff: goodness. The CUDA kernels in every order of threads."""
    monkeypatch.setenv("LGKERNELS_IMPL", impl)
    peer = golden.LF.peer_normalization_loss  # plain torch alone
    monkeypatch.setattr(golden.LF, "peer_normalization_loss", functools.partial(peer, impl="reference"))
    test = (
        golden.test_predsim
        if name.startswith("predsim")
        else golden.test_forward_forward_mean
        if name in golden.FILES["ff_mean"]
        else golden.test_forward_forward_sum
    )
    simt = executor.module() if impl == "cuda" else None
    try:
        for order in executor.ORDERS if simt else (None,):
            if simt:
                simt.set_order(order)
            test(name, torch.float32)
    finally:
        if simt:
            simt.set_order("ascending")
