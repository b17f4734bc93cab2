"""Family zeroth_order for the ahead-of-time gate: every row of its tables, every law and dtype."""

import torch

from lgkernels.ops.zeroth_order import tiles
from lgkernels.ops.zeroth_order import triton as zeroth_order
from lgkernels.ops.zeroth_order.options import Noise

MATRIX_KERNELS = {"linear_kernel"}
TABLES = {"linear_kernel": (tiles.linear_rows, ("BLOCK_M", "BLOCK_N", "BLOCK_K"))}
N, K = 2048, 4096


def cases():
    laws = {
        law: Noise(None, torch.zeros(1, 3, dtype=torch.int64), law) for law in ("sign", "normal", "uniform8", "uniform")
    }
    several = laws["normal"]._replace(states=torch.zeros(2, 3, dtype=torch.int64))
    coefficients = torch.empty(2)
    for rows, dtype, noise, own in (
        (8, torch.float32, laws["sign"], torch.float32),
        (16, torch.float32, laws["normal"], torch.float32),
        (4, torch.bfloat16, laws["sign"], torch.bfloat16),
        (16, torch.bfloat16, laws["uniform8"], torch.bfloat16),
        (64, torch.bfloat16, laws["sign"], torch.bfloat16),
        (64, torch.bfloat16, several, torch.bfloat16),
        (32, torch.float16, laws["uniform"], torch.float16),
        (4, torch.bfloat16, laws["sign"], torch.float32),
    ):
        weight = torch.empty(N, K, dtype=own)
        zeroth_order.perturbed_linear(torch.empty(2, rows, K, dtype=dtype), weight, weight[:, 0], coefficients, noise)
    index = torch.zeros(2, 5, dtype=torch.int64)
    for law, dtype in (("sign", torch.float32), ("normal", torch.bfloat16), ("uniform8", torch.float16)):
        weight = torch.empty(N, K, dtype=dtype)
        zeroth_order.perturbed_rows(weight, index, coefficients, laws[law], torch.float32)
    zeroth_order.perturbed_rows(weight, None, coefficients, several, torch.float16)
    panel = torch.empty(1, 8, K, dtype=torch.bfloat16)  # of a convolution's noise
    zeroth_order._write_rows(panel, None, None, 8, coefficients[:1], laws["sign"], N)
    for law, dtype in (("sign", torch.float32), ("normal", torch.bfloat16), ("uniform8", torch.float16)):
        zeroth_order.formula_update_(torch.empty(N, K, dtype=dtype), coefficients[:1], laws[law], 1.0)
    zeroth_order.formula_update_(torch.empty(N, K), coefficients, several, 0.5)
