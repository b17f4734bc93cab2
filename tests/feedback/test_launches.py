"""Launch shapes of whole layers of the published models, without running them."""

import pytest
import torch

from tests.feedback.common import made
from tests.simt import executor

pytestmark = [
    pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable())),
    pytest.mark.unpoisoned,
]  # memory that nothing touches costs nothing

# (N, K): AlexNet, a ViT, a language model, ResNet convolutions; DFA of 10 and 1000 classes to a first layer at 224
MATRICES = [(4096, 9216), (768, 3072), (11008, 4096), (512, 4608), (64, 147), (10, 131072), (1000, 802816), (1, 1)]
RANDOM = (torch.tensor([1, 2, 3]), "uniform8", 1.0, None)
SHARED_LIMIT = 48 * 1024


@pytest.fixture
def dry():
    simt = executor.module()
    simt.launches()
    simt.set_dry(True)
    yield simt
    simt.set_dry(False)


def check(launches, *counts):
    assert len(launches) in counts
    for blocks, threads, shared in launches:
        assert 0 < blocks < 2**31 and threads == 256 and shared <= SHARED_LIMIT


@pytest.mark.parametrize("random", [None, RANDOM], ids=["signs", "random"])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices(dry, shape, random):
    kernels, weight = executor.backend("feedback"), torch.empty(shape)
    kernels.matrix(shape, made(weight, None, random), torch.bfloat16, torch.device("cpu"))
    kernels.rows(torch.empty(128, dtype=torch.int64), shape[1], made(random=RANDOM), torch.float32)
    kernels.pack_signs(weight)
    check(dry.launches(), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 8, 64, 128])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_products(dry, shape, m, dtype):
    """Enough blocks for a large GPU wherever the matrix is large; the second pass adds the splits."""
    if m * shape[1] > 2**24:
        m = 2**24 // shape[1]
    grad = torch.empty(m, shape[0], dtype=dtype)
    executor.backend("feedback").product_in_registers(grad, shape[1], made(random=RANDOM))
    launches = dry.launches()
    check(launches, 1, 2)
    assert launches[0][0] >= 256 or shape[0] * shape[1] < 2**21 or shape[0] <= 10
