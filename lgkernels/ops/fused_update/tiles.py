"""Block sizes of the fused step's kernel, by sizes, dtype and architecture (core/tiles.py)."""

from ...core.tiles import MATRIX_INSTRUCTIONS_FROM
from .blocks import BLOCK

# M rows of the factors, N rows and K columns of W. The tables were chosen by registers and shared memory, and have not
# been timed on a GPU yet. Adam holds two states beside the weight: smaller tiles.
UPDATE = ((32, 64, 128, 8, 3), (16, 32, 128, 4, 3))
PLAIN_UPDATE = ((16, 32, 64, 4, 2),)  # plain arithmetic holds its operands in registers too


def update_rows(arch):
    """The table on `arch`."""
    return UPDATE if arch >= MATRIX_INSTRUCTIONS_FROM else PLAIN_UPDATE


def _update(sizes, dtype, arch):
    """The tile of W (N, K) that a program updates; its sum runs over M."""
    m, n, k = sizes
    if arch == "interpret":
        return {"BLOCK_M": min(m, 128), "BLOCK_N": min(n, 128), "BLOCK_K": min(k, 512), "num_warps": 1}
    m, n, k, warps, stages = next(row for row in update_rows(arch) if row[0] <= max(m, 16))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# A tile of states of 8 bits is one block of 256 wide.
UPDATE_8BIT = ((32, 16, BLOCK, 8, 3), (16, 16, BLOCK, 8, 3))
PLAIN_UPDATE_8BIT = ((16, 16, BLOCK, 8, 2),)


def update_8bit_rows(arch):
    return UPDATE_8BIT if arch >= MATRIX_INSTRUCTIONS_FROM else PLAIN_UPDATE_8BIT


def _update_8bit(sizes, dtype, arch):
    m, n, _ = sizes
    if arch == "interpret":
        return {"BLOCK_M": min(m, 128), "BLOCK_N": min(n, 128), "BLOCK_K": BLOCK, "num_warps": 1}
    m, n, k, warps, stages = next(row for row in update_8bit_rows(arch) if row[0] <= max(m, 16))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


TILES = {"update": _update, "update_8bit": _update_8bit}
