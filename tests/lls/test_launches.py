"""Launch shapes of whole layers of the published models, without running them."""

import pytest
import torch

from tests.lls.problems import head_arguments
from tests.simt import executor

pytestmark = [
    pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable())),
    pytest.mark.unpoisoned,
]  # memory that nothing touches costs nothing

# (channels, height, pool) and (features, pool): SmallConv, SmallConvL, VGG8, VGG11, MobileNetV1 at 32 to 224 pixels
CONVS = [
    (32, 32, 4),
    (96, 32, 4),
    (128, 32, 4),
    (256, 32, 2),
    (256, 16, 2),
    (512, 8, 2),
    (512, 4, 2),
    (64, 224, 4),
    (32, 112, 8),
    (1024, 7, 1),
    (512, 14, 2),
    (2048, 7, 2),
    (7, 224, 7),
]
LINEARS = [(512, 512), (1024, 2048), (1024, 1024), (4096, 2048), (16384, 16384)]
SHARED_LIMIT = 48 * 1024


@pytest.fixture
def dry():
    simt = executor.module()
    simt.launches()
    simt.set_dry(True)
    yield simt
    simt.set_dry(False)


def check(launches, count):
    assert len(launches) == count
    for blocks, threads, shared in launches:
        assert 0 < blocks < 2**31 and threads in (32, 64, 128, 256) and shared <= SHARED_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
@pytest.mark.parametrize("batch", [1, 128, 1024])
@pytest.mark.parametrize("channels, size, pool", CONVS)
def test_conv_layers(dry, channels, size, pool, batch, layout, dtype):
    kernels = executor.backend("lls")
    z = torch.empty(batch, channels, size, size, dtype=dtype, memory_format=layout)
    norm = [torch.empty(channels) for _ in range(4)]
    kernels.batch_stats(z, norm[0], norm[1], norm[2], 0.1, 1e-5)
    for max_pool in (False, True):
        _, latents, s1, s2 = kernels.norm_act_pool(z, *norm, 0.01, pool, max_pool, True)
    kernels.norm_grads(latents, s1, s2, channels, torch.empty(pool**2))
    kernels.grad_preactivation_(z, *norm, 0.01, latents, norm[0], norm[1], pool, 1.0)
    kernels.expand_grad(latents, torch.empty(()), z, pool)
    check(dry.launches(), 7)


@pytest.mark.parametrize("batch", [1, 128, 1024])
@pytest.mark.parametrize("features, pool", LINEARS)
def test_linear_layers(dry, features, pool, batch):
    kernels, norm, z = executor.backend("lls"), [torch.empty(features) for _ in range(4)], torch.empty(batch, features)
    kernels.norm_act_pool(z, *norm, 0.01, pool, False, True)
    kernels.linear_grad_preactivation_(z, *norm, 0.01, torch.empty(batch, pool), pool, 1.0)
    check(dry.launches(), 2)


@pytest.mark.parametrize("batch", [0, 1, 128, 4096])
@pytest.mark.parametrize("dim", [1, 512, 2048, 16384])
@pytest.mark.parametrize("classes", [10, 100, 1000, 21841])
@pytest.mark.parametrize("packed", [True, False])
def test_heads(dry, packed, classes, dim, batch):
    kernels = executor.backend("lls")
    words = torch.int32 if packed else torch.float32
    phi = torch.empty(classes, -(-dim // 32) if packed else dim, dtype=words)
    _, _, similarity, grad_logits = kernels.head(
        torch.empty(batch, dim),
        torch.empty(batch, dtype=torch.int64),
        torch.empty(classes),
        phi,
        *head_arguments(classes),
    )
    kernels.modulation_grad(similarity, grad_logits, True, torch.empty(()))
    kernels.modulation_grad(similarity[:, :20], grad_logits, False, torch.empty(()))
    check(dry.launches(), 4 if batch else 3)
