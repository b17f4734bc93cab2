"""Block sizes of the fused step's kernel, by sizes, dtype and architecture (core/tiles.py)."""

from ...core.tiles import MATRIX_INSTRUCTIONS_FROM

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


TILES = {"update": _update}
