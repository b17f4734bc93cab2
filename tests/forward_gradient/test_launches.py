"""Launch shapes of whole layers of the published networks, without running them."""

import pytest
import torch

from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from tests.simt import executor

pytestmark = [
    pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable())),
    pytest.mark.unpoisoned,
]  # memory that nothing touches costs nothing

# S/1/1, M/1/16, M/8/16, L/8/64, L/32/64: (P, G, C)
NETWORKS = [(1, 1, 256), (1, 16, 32), (64, 16, 32), (64, 64, 32), (1024, 64, 32)]
SHARED_LIMIT = 48 * 1024


@pytest.fixture
def dry():
    simt = executor.module()
    simt.launches()
    simt.set_dry(True)
    yield simt
    simt.set_dry(False)


def check(launches, blocks, count=1):
    """The largest launch has at least `blocks` blocks."""
    assert len(launches) == count
    assert max(n for n, _, _ in launches) >= blocks
    for n, threads, shared in launches:
        assert 0 < n < 2**31 and 32 <= threads <= 256 and shared <= SHARED_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_networks(dry, network, batch, dtype):
    kernels, (patches, groups, channels) = executor.backend("forward_gradient"), network
    x, width = torch.empty(batch, *network, dtype=dtype), groups * channels
    teach, grad = torch.empty(batch, width), torch.empty(batch, patches, groups)
    enough = 256 if batch == 128 and patches > 1 else 1  # for a large GPU
    for layer_norm in (False, True):
        kernels.pooled(x, layer_norm)
        check(dry.launches(), enough, 2 if layer_norm and channels > 128 else 1)
        normed = x if layer_norm else None
        kernels.tangent(normed, x, teach, None, grad)
        check(dry.launches(), enough)
        kernels.cotangent(normed, grad, teach, x)
        check(dry.launches(), enough)
    for classes in (10, 1000):
        kernels.classify(teach, torch.empty(width, classes), None, torch.zeros(batch, dtype=torch.int64))
        check(dry.launches(), batch if classes > 32 else -(-batch // 8))
    noise = Noise(None, torch.empty(3, dtype=torch.int64))
    for z, dim in ((x, 3), (x.flatten(2), 2), (x.flatten(2), 1)):  # groups, tokens, the transposed mixing's tokens
        options = NormOptions(dim, 1e-5, True)
        kernels.dual_norm(z, z, None, noise, options)
        check(dry.launches(), enough)
        kernels.activity_grad(z, z, z.narrow(dim, 0, 1), noise, options)
        check(dry.launches(), enough)
