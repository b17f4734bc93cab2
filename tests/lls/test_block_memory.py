"""Peak memory of a fused block's step, in terms of the sizes of its tensors."""

import pytest
import torch

from lgkernels.nn import LLSConvBlock
from lgkernels.recipes.measure import peak_memory
from tests.conftest import unavailable
from tests.support.problems import randn, targets

BATCH, SIZE, POOL, FLOAT = 32, 7, 2, 4


@pytest.mark.parametrize("channels, max_pool", [((64, 128), True), ((64, 128), False), ((128, 128), False)], ids=str)
def test_the_preactivation_is_gone_before_the_gradient_of_the_weight(channels, max_pool):
    """The peak is the weight's gradient. By then the pre-activation lives on as its own gradient alone: once in the
    format that the convolution wants, once in the convolution's own. A block that keeps it needs one more of them."""
    if unavailable("cpu"):
        pytest.skip("the fused path on the CPU needs the native module")
    inputs, outputs = channels
    block = LLSConvBlock(inputs, outputs, 3, padding=1, num_classes=10, pool_size=POOL, max_pool=max_pool)
    x, target = randn(BATCH, inputs, SIZE, SIZE), targets(BATCH, 10)

    def step():
        block(x, target)[1].backward()

    step()
    block.zero_grad(set_to_none=True)
    preactivation = BATCH * outputs * SIZE**2 * FLOAT
    out = BATCH * outputs * (SIZE // 2 if max_pool else SIZE) ** 2 * FLOAT
    latents = BATCH * outputs * POOL**2 * FLOAT
    per_bin = 4 * latents  # the latents, their gradient, and two sums for the norm's gradients
    of_convolution = x.numel() * FLOAT + block.layer.weight.numel() * FLOAT  # its copy of x, and what it returns
    small = preactivation // 8  # vectors of a channel or a sample
    bound = out + per_bin + 2 * preactivation + of_convolution + small
    peak = peak_memory(step, torch.device("cpu"))
    assert peak <= bound, f"{peak} bytes, of which one pre-activation is {preactivation}; at most {bound} expected"
