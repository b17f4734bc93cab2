"""Triton kernels of the products: dX = grad F with F made in registers, and the fused update W, v <- SGD(grad^T x)."""

import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, within
from ..common.dot import dot
from ..common.rounding import rounded
from .triton_matrix import load_state, values


@triton.jit(do_not_specialize=["M", "slices"])
def product_kernel(
    grad,
    out,
    weight,
    magnitude,
    state,
    scale,
    law_scale,
    span,
    low,
    M,
    N,
    K,
    slices,
    weight_row,
    weight_column,
    magnitude_row,
    magnitude_column,
    LAW: tl.constexpr,
    HAS_LOW: tl.constexpr,
    SIGNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[slice] (M, K) = grad (M, N) F over every `slices`-th block of rows of F. Neighbouring programs share a panel
    of F."""
    pid = program_id(0)
    m_blocks, k_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    m, block = indices(pid % m_blocks, BLOCK_M), pid // m_blocks % k_blocks
    slice = pid // m_blocks // k_blocks
    seed, stream, step = load_state(state, LAW)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for rows in range(slice, tl.cdiv(N, BLOCK_N), slices):
        n = indices(rows, BLOCK_N)
        g = load_tile(grad, m, n, M, N)
        f = values(
            weight,
            magnitude,
            seed,
            stream,
            step,
            law_scale,
            span,
            low,
            n,
            block,
            N,
            K,
            weight_row,
            weight_column,
            magnitude_row,
            magnitude_column,
            LAW,
            HAS_LOW,
            SIGNS,
            BLOCK_K,
        )
        total = dot(g, f, total, PRECISION)
    k = indices(block, BLOCK_K)
    row = offset(offset(slice, M) + m, K)
    tl.store(
        out + row[:, None] + k[None, :],
        rounded(total * tl.cast(scale, tl.float32), out.dtype.element_ty),
        mask=within(m, M, k, K),
    )


@triton.jit(do_not_specialize=["slices"])
def sum_slices_kernel(partial, out, size, slices, BLOCK: tl.constexpr):
    """out = sum of partial over its slices, in order."""
    i = indices(program_id(0), BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slice in range(slices):
        total += tl.load(partial + offset(slice, size) + i, mask=i < size, other=0.0)
    tl.store(out + i, rounded(total, out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["M"])
def sgd_update_kernel(
    weight,
    momentum_buffer,
    grad,
    x,
    lr,
    momentum,
    dampening,
    weight_decay,
    grad_scale,
    M,
    N,
    K,
    weight_row,
    weight_column,
    buffer_row,
    buffer_column,
    NESTEROV: tl.constexpr,
    MANHATTAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of W and v: its whole sum over the samples, then the step of torch.optim.SGD or Batch Manhattan."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    n, k = indices(pid // blocks, BLOCK_N), indices(pid % blocks, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        g = load_tile(grad, m, n, M, N)
        columns = load_tile(x, m, k, M, K)
        total = dot(tl.trans(g), columns, total, PRECISION)
    total = total * tl.cast(grad_scale, tl.float32)
    if MANHATTAN:
        total = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    inside = within(n, N, k, K)
    at = weight + offset(n, weight_row)[:, None] + offset(k, weight_column)[None, :]
    w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total += tl.cast(weight_decay, tl.float32) * w
    if momentum_buffer is not None:
        mu = tl.cast(momentum, tl.float32)
        at_buffer = momentum_buffer + offset(n, buffer_row)[:, None] + offset(k, buffer_column)[None, :]
        v = mu * tl.load(at_buffer, mask=inside, other=0.0).to(tl.float32)
        v += (1.0 - tl.cast(dampening, tl.float32)) * total
        tl.store(at_buffer, rounded(v, momentum_buffer.dtype.element_ty), mask=inside)
        total = total + mu * v if NESTEROV else v
    tl.store(at, rounded(w - tl.cast(lr, tl.float32) * total, weight.dtype.element_ty), mask=inside)
