"""Address arithmetic of the Triton kernels, always in int64.

A program id and an index vector are int32; multiplied by a stride they overflow at 2^31 elements (a 4.3 GB tensor in
bfloat16). So kernels take program ids from `program_id` and turn an index into an offset with `offset` only.
"""
import triton
import triton.language as tl


@triton.jit
def program_id(axis: tl.constexpr):
    """tl.program_id as int64."""
    return tl.program_id(axis).to(tl.int64)


@triton.jit
def offset(index, stride):
    """index * stride in int64; `index` is a tensor of any integer type."""
    return index.to(tl.int64) * stride


@triton.jit
def indices(block, BLOCK: tl.constexpr):
    """int64 indices of block number `block`: block * BLOCK + (0 .. BLOCK-1)."""
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
