"""Block sizes of the zeroth-order kernels, by sizes, dtype and architecture (core/tiles.py)."""

import torch

from ...core.tiles import MATRIX_INSTRUCTIONS_FROM

# Rows of x, outputs, inputs, warps, stages. One tile holds all rows of few, so each weight is read and each value of
# the noise made once. The three products of float32 hold all of their operands in registers: small tiles, wide in the
# outputs, over which the warps part. Chosen by registers and shared memory; not timed on a GPU yet.
LINEAR = ((64, 32, 128, 8, 3), (32, 16, 128, 4, 3), (16, 16, 128, 4, 3))
FLOAT_LINEAR = ((16, 32, 128, 4, 2),)


def linear_rows(arch):
    """The product's tables on `arch`; without matrix instructions there is no kernel."""
    return LINEAR + FLOAT_LINEAR if arch >= MATRIX_INSTRUCTIONS_FROM else ()


def _linear(sizes, dtype, arch):
    """None where the library's products of noise that is written are to be taken: plain arithmetic would spill."""
    rows, outputs, inputs, v = sizes
    if arch == "interpret":
        block_k = max(min(inputs, 512), 32, v)
        return {"BLOCK_M": min(rows, 128), "BLOCK_N": min(outputs, 128), "BLOCK_K": block_k, "num_warps": 1}
    if arch < MATRIX_INSTRUCTIONS_FROM:
        return None
    table = FLOAT_LINEAR if dtype == torch.float32 else LINEAR
    m, n, k, warps, stages = next((row for row in table if row[0] <= max(rows, 16)), table[-1])
    # a call of the sign law makes 128 columns of a row
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages, "maxnreg": 255}


def _update(sizes, dtype, arch):
    """Tile (rows, columns) of the pass over a weight; a Philox call makes v columns of a row."""
    rows, columns, v = sizes
    if arch == "interpret":
        return {"BLOCK_N": min(rows, 128), "BLOCK_K": max(min(columns, 1024), 4, v), "num_warps": 1}
    block_k = max(min(columns, 256), 128)
    return {"BLOCK_N": 2048 // block_k, "BLOCK_K": block_k, "num_warps": 4}


TILES = {"linear": _linear, "update": _update}
