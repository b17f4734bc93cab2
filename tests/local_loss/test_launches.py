"""Launch shapes of whole layers of the published models, without running them."""

import pytest
import torch

from tests.simt import executor

pytestmark = [
    pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable())),
    pytest.mark.unpoisoned,
]  # memory that nothing touches costs nothing

# ResNet-50's stages and stem at 224 pixels, a ViT's tokens, a layer of Forward-Forward
MAPS = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (64, 112, 112), (197, 768), (2000,)]
SHARED_LIMIT = 48 * 1024


@pytest.fixture
def dry():
    simt = executor.module()
    simt.launches()
    simt.set_dry(True)
    yield simt
    simt.set_dry(False)


def check(launches, count, blocks):
    """The largest launch has at least `blocks` blocks."""
    assert len(launches) == count
    assert max(n for n, _, _ in launches) >= blocks
    for n, threads, shared in launches:
        assert 0 < n < 2**31 and 32 <= threads <= 256 and shared <= SHARED_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps(dry, shape, batch, layout, dtype):
    kernels, conv = executor.backend("local_loss"), len(shape) == 3
    h = torch.empty(batch, *shape, dtype=dtype, **(dict(memory_format=layout) if conv else {}))
    target, one = torch.zeros(batch, dtype=torch.int64), torch.empty(())
    enough = 256 if batch == 64 and h.numel() >= 2**22 else 1  # for a large GPU
    _, kappa, _ = kernels.goodness(h, target == 0, 2.0, True, True)
    check(dry.launches(), 2, enough)
    kernels.goodness_grad(h, kappa, one)
    check(dry.launches(), 1, enough)
    channels = shape[0] if conv else shape[-1]
    kernels.local_cross_entropy(h, torch.empty(100, channels), None, target, 0.0, "mean", True)
    check(dry.launches(), 1 if len(shape) == 1 else 2, enough if len(shape) > 1 else 1)
    if conv:
        _, grad, mean = kernels.similarity(h, target, 100, True, True)
        check(dry.launches(), 4, enough)
        kernels.similarity_grad(h, grad, mean, one)
        check(dry.launches(), 1, enough)


def test_offset_step(dry):
    """ResNet-50's sizes: 161 tensors in three launches, a block for every 8192 elements."""
    tensors = [torch.empty(1).expand(n) for n in [2048 * 512 * 9] * 20 + [64] * 141]
    table = [(t.data_ptr(),) * 4 + (t.numel(), 0) for t in tensors]
    assert executor.module().offset_sgd((0.1, 0.9, 0.0, 1.0, 1.0), table, 0) == 0
    check(dry.launches(), 3, 20 * 2048 * 512 * 9 // 8192)
