"""Block sizes of the feedback kernels, by sizes, dtype and architecture (core/tiles.py)."""

import torch

from ...core.tiles import MATRIX_INSTRUCTIONS_FROM

# M rows of the gradient, N rows and K columns of F. One tile holds all M up to 128 (64 in float32, whose
# three products take more registers), so each weight is read and made once. The tables were chosen by registers and
# shared memory, and have not been timed on a GPU yet.
PRODUCT = ((128, 32, 128, 8, 3), (64, 32, 128, 8, 3), (32, 32, 128, 8, 4), (16, 32, 128, 4, 4))

# Plain arithmetic holds its operands in registers too: smaller tiles.
PLAIN_PRODUCT = ((32, 16, 64, 4, 2), (16, 16, 64, 4, 2))


def product_rows(arch):
    """The product's table on `arch`."""
    return PRODUCT if arch >= MATRIX_INSTRUCTIONS_FROM else PLAIN_PRODUCT


def _matrix(sizes, dtype, arch):
    """Tile (rows, columns) of a pass that writes F; a Philox call makes v columns of a row."""
    rows, columns, v = sizes
    if arch == "interpret":
        return {"BLOCK_N": min(rows, 128), "BLOCK_K": max(min(columns, 1024), 32, v), "num_warps": 1}
    block_k = max(min(columns, 256), 128)
    return {"BLOCK_N": 2048 // block_k, "BLOCK_K": block_k, "num_warps": 4}


def _product(sizes, dtype, arch):
    """grad (M, N) times F (N, K), made v columns of a row at a time (at least a word of packed signs)."""
    m, n, k, v = sizes
    if arch == "interpret":
        return {"BLOCK_M": min(m, 128), "BLOCK_N": min(n, 128), "BLOCK_K": max(min(k, 512), 32, v), "num_warps": 1}
    wanted = min(max(m, 16), 64 if dtype == torch.float32 else 128)
    block_m, block_n, block_k, warps, stages = next(row for row in product_rows(arch) if row[0] <= wanted)
    if v > 1 and block_m <= 32:
        block_n = 16  # random values pass through shared memory: smaller tiles leave room for more programs
    # Without a limit of its own the assembler aims at a round number of programs and spills eight bytes to meet it.
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": max(min(n, block_n), 16),
        "BLOCK_K": max(block_k, v),
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": 168 if block_m <= 32 and arch >= MATRIX_INSTRUCTIONS_FROM else 255,
    }


def _sum(sizes, dtype, arch):
    return {"BLOCK": min(sizes[0], 1 << 16) if arch == "interpret" else 512, "num_warps": 4}


TILES = {"matrix": _matrix, "product": _product, "sum": _sum}
