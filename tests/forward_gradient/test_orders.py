"""The kernels of forward gradients give the same bits whatever the order of threads and blocks.

That the bits are right (all dtypes, layouts, sizes) is tested in test_kernels.py, where "cuda-simt" is a backend.
"""

import functools

import pytest
import torch

from lgkernels.ops.forward_gradient.options import Noise, NormOptions
from tests.simt import executor
from tests.simt.orders import in_every_order
from tests.support.problems import randn, targets

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
run = functools.partial(in_every_order, "forward_gradient")
STATE = torch.tensor([5, 1, 2])


# one lane a row, eight of them, a warp that walks; vectors or not; rows that fill a block, and that do not
SHAPES = [(2, 3, 5, 3), (2, 9, 8, 32), (1, 20, 2, 33), (2, 3, 1, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses(shape, layer_norm, dtype):
    n, patches, groups, channels = shape
    x, v = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    teach, grad, head = randn(n, groups * channels, seed=2), randn(n, patches, groups, seed=3), randn(n, seed=4)
    normed = x if layer_norm else None
    run(lambda kernels: kernels.pooled(x, layer_norm))
    run(lambda kernels: kernels.tangent(normed, v, teach, head, torch.empty_like(grad)))
    run(lambda kernels: kernels.cotangent(normed, grad, teach, torch.empty_like(x)))


@pytest.mark.parametrize("rows, width, classes", [(3, 40, 1), (9, 600, 10), (5, 300, 32), (2, 20, 33), (2, 20, 1500)])
def test_classify(rows, width, classes):
    arguments = randn(rows, width), randn(width, classes, seed=1), randn(classes, seed=2), targets(rows, classes)
    run(lambda kernels: kernels.classify(*arguments))


@pytest.mark.parametrize("law", ["normal", "sign"])
@pytest.mark.parametrize("shape, dim", [*((s, 3) for s in SHAPES), ((2, 9, 5), 1), ((2, 40, 150), 1)], ids=str)
def test_layers(shape, dim, law):
    z, v, options = randn(*shape), randn(*shape, seed=1), NormOptions(dim, 1e-5, True)
    coefficient = v.narrow(dim, 0, 1).contiguous()
    for noise in (Noise(v), Noise(None, STATE, law)):
        run(lambda kernels, noise=noise: kernels.dual_norm(z, v, v, noise, options))
        run(lambda kernels, noise=noise: kernels.activity_grad(z, v, coefficient, noise, options))
