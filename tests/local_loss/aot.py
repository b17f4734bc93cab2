"""Family local_loss for the ahead-of-time gate: both layouts, aligned and odd maps, two dtypes."""

import torch

from lgkernels.ops.local_loss import triton as local

MATRIX_KERNELS = set()  # the library multiplies
TABLES = {}

BF16 = torch.bfloat16


def cases():
    target, one = torch.zeros(64, dtype=torch.int64), torch.empty(())
    maps = [torch.empty(64, 256, 56, 56, dtype=BF16), torch.empty(64, 256, 56, 56, memory_format=torch.channels_last)]
    for h in maps:
        local.local_cross_entropy(h, torch.empty(100, 256), None, target, 0.0, "mean", True)
        _, kappa, _ = local.goodness(h, target == 0, 2.0, True, True)
        _, grad, mean = local.similarity(h, target, 100, True, True)
        local.similarity_grad(h, grad, mean, one)
    local.goodness_grad(maps[0], kappa, one)
    odd = torch.empty(64, 2048, 7, 7)
    local.local_cross_entropy(odd, torch.empty(1000, 2048), None, target, 0.0, "mean", True)
