"""The kernels of the local losses give the same bits whatever the order of threads and blocks.

That the bits are right (all dtypes, layouts, sizes) is tested in test_kernels.py, where "cuda-simt" is a backend.
"""

import functools

import pytest
import torch

from tests.simt import executor
from tests.simt.orders import in_every_order
from tests.support.layouts import arrange
from tests.support.problems import randn, targets

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
local = functools.partial(in_every_order, "local_loss")
ONE = torch.tensor(0.7)


# one case a division of the work. Dense: a lane a plane, several planes a warp, a plane a warp, warps of one plane;
# 16-byte vectors or not. Channels last: one lane, eight lanes and several tiles, more positions than a block's rows
MAPS = [
    ((2, 5, 1, 1), "dense"),
    ((2, 24, 5, 7), "dense"),
    ((3, 8, 16, 16), "dense"),
    ((1, 3, 40, 70), "dense"),
    ((2, 3, 6, 5), "channels_last"),
    ((1, 72, 9, 8), "channels_last"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, layout", MAPS, ids=str)
def test_maps(shape, layout, dtype):
    h, (batch, channels) = arrange(randn(*shape, dtype=dtype), layout), shape[:2]
    weight, target = randn(6, channels, seed=1), targets(batch, 6)
    local(lambda kernels: kernels.local_cross_entropy(h, weight, None, target, 0.1, "mean", True))
    _, kappa, _ = local(lambda kernels: kernels.goodness(h, target > 2, 2.0, True, True))
    local(lambda kernels: kernels.goodness_grad(h, kappa, ONE))
    _, grad, mean = local(lambda kernels: kernels.similarity(h, target, 6, True, True))
    local(lambda kernels: kernels.similarity_grad(h, grad, mean, ONE))


def test_goodness_of_rows_in_several_parts():
    h, positive = randn(3, 40000), torch.tensor([True, False, True])
    _, kappa, _ = local(lambda kernels: kernels.goodness(h, positive, 2.0, True, True))
    local(lambda kernels: kernels.goodness_grad(h, kappa, ONE))


@pytest.mark.parametrize("batch, classes", [(3, 10), (2, 300), (1, 1500)])
def test_rows_of_one_and_of_several_warps(batch, classes):
    x, weight, target = randn(batch, 20), randn(classes, 20, seed=1), targets(batch, classes)
    local(lambda kernels: kernels.local_cross_entropy(x, weight, None, target, 0.1, "none", True))
    local(lambda kernels: kernels.similarity(randn(batch, classes), target, classes, True, True))
