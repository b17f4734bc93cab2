"""Family feedback for the ahead-of-time gate: every row of its tables, every law, kind of sign and dtype."""

import torch

from lgkernels.ops.feedback import tiles
from lgkernels.ops.feedback import triton as feedback
from tests.feedback.common import made

MATRIX_KERNELS = {"product_kernel"}
TABLES = {"product_kernel": (tiles.product_rows, ("BLOCK_M", "BLOCK_N", "BLOCK_K"))}

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
N, K = 4096, 9216


def cases():
    state = torch.zeros(3, dtype=torch.int64)
    uniform, normal, byte, bit = ((state, law, 1.0, None) for law in ("uniform", "normal", "uniform8", "sign"))
    positive = (state, "uniform8", 1.0, 0.0)  # the law of frSF and brSF by default
    weight, half, packed = torch.empty(N, K), torch.empty(N, K, dtype=BF16), torch.empty(N, K // 32, dtype=torch.int32)
    for m, dtype, w, magnitude, random, plus in (
        (8, FLOAT, weight, None, None, False),
        (32, FLOAT, weight, None, None, False),
        (64, FLOAT, weight, None, None, False),
        (8, BF16, weight, None, None, False),
        (64, BF16, weight, None, None, False),
        (128, BF16, half, None, None, True),
        (32, HALF, weight, None, byte, False),
        (8, FLOAT, weight, None, byte, False),
        (64, FLOAT, weight, None, uniform, False),
        (8, FLOAT, weight, None, normal, False),
        (64, FLOAT, weight, None, bit, False),
        (128, BF16, half, weight, None, False),
        (8, FLOAT, None, None, uniform, False),
        (64, HALF, weight, None, positive, False),
        (128, BF16, None, None, byte, False),
        (32, FLOAT, packed, None, None, True),
        (128, BF16, packed, None, None, True),
    ):
        feedback.product(torch.empty(m, N, dtype=dtype), K, made(w, magnitude, random, 1.0, plus))
    feedback.product(torch.empty(128, 10), 131072, made(random=(state, "uniform", 1.0, 0.0)))  # DFA
    for w, magnitude, random, dtype in (
        (weight, None, None, BF16),
        (weight, None, byte, BF16),
        (weight, None, positive, HALF),
        (None, None, normal, FLOAT),
        (weight.t(), weight.t(), None, FLOAT),
        (packed, None, None, BF16),
        (weight, None, bit, HALF),
    ):
        shape = (N, K) if w is None or w is packed else w.shape
        feedback.matrix(shape, made(w, magnitude, random, 1.0, w is packed), dtype, state.device)
    feedback.rows(torch.empty(128, dtype=torch.int64), 131072, made(random=uniform), FLOAT)
    feedback.pack_signs(weight)
