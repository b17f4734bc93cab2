"""Address arithmetic of the Triton kernels: every product with a stride is taken in int64.

A program id and an index vector are int32; multiplied by a stride they overflow at 2^31 elements (a 4.3 GB tensor in
bfloat16). So kernels take program ids from `program_id`, may divide them, and multiply them only in `indices` and
`offset`. (A CUDA grid has fewer than 2^31 programs.)
"""

import triton
import triton.language as tl


@triton.jit
def program_id(axis: tl.constexpr):
    """tl.program_id, int32: divisions by it are cheap. Multiply it with `indices` or `offset` only."""
    return tl.program_id(axis)


@triton.jit
def offset(index, stride):
    """index * stride in int64; `index` is an integer or a tensor of any integer type."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def indices(block, BLOCK: tl.constexpr):
    """int64 indices of block number `block`: block * BLOCK + (0 .. BLOCK-1)."""
    return tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def within(row, rows, column, columns):
    """Mask of a tile: where `row` is below `rows` and `column` below `columns`."""
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_tile(matrix, row, column, rows, columns):
    """Tile of a dense (rows, columns) matrix, 0 outside of it."""
    return tl.load(
        matrix + offset(row, columns)[:, None] + column[None, :], mask=within(row, rows, column, columns), other=0.0
    )


@triton.jit
def store_tile(matrix, value, row, column, rows, columns):
    """Store a tile of a dense (rows, columns) matrix, as far as it lies inside."""
    tl.store(matrix + offset(row, columns)[:, None] + column[None, :], value, mask=within(row, rows, column, columns))
