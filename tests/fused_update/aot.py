"""Family fused_update for the ahead-of-time gate: every row of its table, every kind of step and dtype."""

import torch

from lgkernels.ops.fused_update import tiles
from lgkernels.ops.fused_update import triton as kernels
from tests.fused_update.common import STEPS

BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
MATRIX_KERNELS = {"fused_update_kernel", "fused_update_8bit_kernel"}
TABLES = {
    "fused_update_kernel": (tiles.update_rows, BLOCKS),
    "fused_update_8bit_kernel": (tiles.update_8bit_rows, BLOCKS),
}

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
N, K = 4096, 9216


def cases():
    weight, half = torch.empty(N, K), torch.empty(N, K, dtype=BF16)
    for m, dtype, own, gradient, rule in (
        (8, FLOAT, (weight, weight, None), None, "nesterov"),
        (128, BF16, (weight, weight, None), None, "nesterov"),
        (128, FLOAT, (weight, None, None), None, "manhattan"),
        (128, HALF, (weight, weight, None), None, "momentum"),
        (8, FLOAT, (weight, weight, weight), None, "adamw"),
        (128, FLOAT, (weight, weight, weight), weight, "adamw"),
        (128, BF16, (weight, weight, weight), None, "adamw"),
        (128, BF16, (half, half, half), half, "adamw"),
    ):
        factors = torch.empty(m, N, dtype=dtype), torch.empty(m, K, dtype=dtype)
        kernels.update_(*own, gradient, *factors, STEPS[rule])
    codes, absmax = torch.empty(N, K, dtype=torch.uint8), torch.empty(N, K // 256)
    for m, dtype, own, gradient, rule in (
        (8, FLOAT, weight, None, "adamw"),
        (128, FLOAT, weight, weight, "adamw"),
        (128, BF16, half, None, "adamw"),
        (128, BF16, half, half, "nesterov"),
    ):
        factors = torch.empty(m, N, dtype=dtype), torch.empty(m, K, dtype=dtype)
        states = codes, absmax, *((codes, absmax) if rule == "adamw" else (None, None))
        kernels.update_8bit_(own, *states, gradient, *factors, STEPS[rule])
