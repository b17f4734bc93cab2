"""The kernel gives the same bits whatever the order of threads and blocks, and launches what a large GPU can take.

That the bits are right is tested in test_kernels.py, on the backend "cuda-simt".
"""

import pytest
import torch

from lgkernels.ops.fused_update.blocks import blocks_of, encoded
from tests.fused_update.common import STEPS
from tests.simt import executor
from tests.simt.orders import in_every_order
from tests.support.problems import randn

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
@pytest.mark.parametrize("m, n, k", [(40, 70, 140), (3, 5, 7)])
def test_update(m, n, k, name):
    made = [randn(n, k, seed=seed) for seed in (1, 2, 3, 4)]
    made[2].abs_()
    grad, x = randn(m, n, seed=5), randn(m, k, seed=6)

    def run(kernels):
        weight, first, second = (t.clone() for t in made[:3])
        kernels.update_(weight, first, second if name == "adamw" else None, made[3], grad, x, STEPS[name])
        return weight, first, second

    in_every_order("fused_update", run)


@pytest.mark.parametrize("m, n, k", [(40, 35, 300), (3, 5, 7)])
def test_update_8bit(m, n, k):
    weight, first, second, gradient = (randn(n, k, seed=seed) for seed in (1, 2, 3, 4))
    made = weight, *encoded(first, True), *encoded(second.abs(), False)
    grad, x = randn(m, n, seed=5), randn(m, k, seed=6)

    def run(kernels):
        own = [t.clone() for t in made]
        kernels.update_8bit_(*own, gradient, grad, x, STEPS["adamw"])
        return tuple(own)

    in_every_order("fused_update", run)


@pytest.mark.unpoisoned  # memory that nothing touches costs nothing
@pytest.mark.parametrize("m", [0, 1, 128])
@pytest.mark.parametrize("shape", [(4096, 9216), (768, 3072), (11008, 4096), (64, 147), (1, 1)], ids=str)
def test_launches(shape, m):
    """Those of whole layers of published models, without running them."""
    simt = executor.module()
    simt.launches()
    simt.set_dry(True)
    try:
        own = [torch.empty(shape) for _ in range(3)]
        factors = torch.empty(m, shape[0]), torch.empty(m, shape[1])
        executor.backend("fused_update").update_(*own, None, *factors, STEPS["adamw"])
        codes, absmax = torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], blocks_of(shape[1]))
        executor.backend("fused_update").update_8bit_(own[0], *[codes, absmax] * 2, None, *factors, STEPS["adamw"])
        launches = simt.launches()
    finally:
        simt.set_dry(False)
    assert len(launches) == 2
    for blocks, threads, shared in launches:
        assert 0 < blocks < 2**31 and threads == 256 and shared <= 48 * 1024
