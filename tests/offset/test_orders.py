"""The kernel of the offset step gives the same bits whatever the order of threads and blocks.

That the bits are right (all dtypes, layouts, sizes) is tested in test_kernels.py, where "cuda-simt" is a backend.
"""

import pytest
import torch

from lgkernels.ops.offset.options import StepOptions
from tests.simt import executor
from tests.simt.orders import in_every_order
from tests.support.problems import randn

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))


def test_offset_step():
    """More tensors than one launch takes, sizes around one block's, one tensor off the 16-byte grid."""
    sizes = [8191, 8192, 8193, 0, *[5] * 75, 4]
    params, grads, buffers, offsets = ([randn(n, seed=100 * i + j) for j, n in enumerate(sizes)] for i in range(4))
    params[4] = randn(6)[1:]
    offsets[1], offsets[2] = None, offsets[2].bfloat16()

    def run(kernels):
        own, velocity = [p.clone() for p in params], [b.clone() for b in buffers]
        own[4] = torch.cat([params[4][:1], params[4]])[1:]
        kernels.step_(own, grads, velocity, offsets, StepOptions(0.1, 0.9, 0.01, 0.5, 2.0, 0.25))
        return *own, *velocity

    in_every_order("offset", run)
