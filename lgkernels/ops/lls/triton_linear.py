"""Triton kernels of the linear block, z (B, N): every column has its own statistics, and the bins of the latents run
over the columns. As in triton_bins.py a column is owned by one bin, which writes its output."""

import torch
import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id, store_tile, within
from ..common.launch import block_count, configuration, launch, new
from .tiles import TILES
from .triton_bins import bin_range, cover, widest
from .triton_finish import finish_head, finishing


@triton.jit
def _columns(vector, n, N):
    return tl.load(vector + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["B", "P", "widest"])
def linear_pool_kernel(
    z,
    out,
    latents,
    mean,
    rstd,
    gamma,
    beta,
    slope,
    B,
    N,
    P,
    widest,
    NORM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = leaky_relu(gamma * (z - mean) * rstd + beta) (with NORM), latents = means over bins of out, or of z.
    `widest` is the number of columns of the largest bin."""
    pid = program_id(0)
    blocks = tl.cdiv(P, BLOCK_N)
    b, j = indices(pid // blocks, BLOCK_B), indices(pid % blocks, BLOCK_N)
    left, right, next_left = bin_range(j, N, P)
    inside = within(b, B, j, P)
    total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for k in range(widest):
        n = left + k
        at = offset(b, N)[:, None] + n[None, :]
        value = tl.load(z + at, mask=inside & (n < right)[None, :], other=0.0).to(tl.float32)
        if NORM:
            u = (value - _columns(mean, n, N)) * _columns(rstd, n, N) * _columns(gamma, n, N) + _columns(beta, n, N)
            value = tl.where(u > 0, u, u * tl.cast(slope, tl.float32))
            tl.store(out + at, value.to(out.dtype.element_ty), mask=inside & (n < next_left)[None, :])
        total += tl.where((n < right)[None, :], value, 0.0)
    width = ((right - left) * 1.0)[None, :]
    store_tile(latents, total / width, b, j, B, P)


def pool_columns(z, norm, negative_slope, pool_size):
    """`(out, latents)`; norm: (mean, rstd, gamma, beta), or None: no norm, no activation and no `out`."""
    z = z.contiguous()
    B, N = z.shape
    out, latents = torch.empty_like(z) if norm else None, new(z, B, pool_size)
    config = configuration(TILES["linear_pool"], (B, pool_size), z)
    launch(
        linear_pool_kernel,
        block_count(B, config["BLOCK_B"]) * block_count(pool_size, config["BLOCK_N"]),
        z.device,
        z,
        out,
        latents,
        *(norm or (None,) * 4),
        negative_slope,
        B,
        N,
        pool_size,
        widest(N, pool_size),
        NORM=bool(norm),
        **config,
    )
    return out, latents


@triton.jit
def _unpooled(grad_latents, b, n, B, N, P, cover):
    """Sum over the bins that hold column n of grad / width, (rows, columns)."""
    total = tl.zeros((b.shape[0], n.shape[0]), tl.float32)
    first, last, _ = bin_range(n, P, N)  # the bins that hold a position are a bin of bins
    for k in range(cover):
        j = first + k
        covers = (n < N) & (j < last)
        left, right, _ = bin_range(j, N, P)
        width = (right - left) * 1.0
        total += (
            tl.load(
                grad_latents + offset(b, P)[:, None] + j[None, :], mask=(b < B)[:, None] & covers[None, :], other=0.0
            )
            / width[None, :]
        )
    return total


@triton.jit(do_not_specialize=["B", "P", "cover"])
def linear_expand_kernel(
    grad_latents, scale, out, B, N, P, cover, PER_ROW: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = scale * unpool(grad_latents); scale is one value or one a sample."""
    pid = program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    b, n = indices(pid // blocks, BLOCK_B), indices(pid % blocks, BLOCK_N)
    if PER_ROW:
        factor = tl.load(scale + b, mask=b < B, other=0.0).to(tl.float32)[:, None]
    else:
        factor = tl.load(scale).to(tl.float32)
    result = _unpooled(grad_latents, b, n, B, N, P, cover) * factor
    store_tile(out, result.to(out.dtype.element_ty), b, n, B, N)


def expand_columns(grad_latents, scale, out, pool_size):
    """Into rows `out`, which it returns."""
    B, N = out.shape
    config = configuration(TILES["linear_expand"], (B, N), out)
    programs = block_count(B, config["BLOCK_B"]) * block_count(N, config["BLOCK_N"])
    sizes = B, N, pool_size, cover(N, pool_size)
    modes = dict(PER_ROW=scale.dim() > 0)
    launch(linear_expand_kernel, programs, out.device, grad_latents, scale, out, *sizes, **modes, **config)
    return out


@triton.jit
def _linear_grad(
    block,
    z,
    mean,
    rstd,
    gamma,
    beta,
    grad_latents,
    grad_gamma,
    grad_beta,
    grad_bias,
    slope,
    scale,
    B,
    N,
    P,
    cover,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For a block of columns: dgamma, dbeta over the whole batch, then z <- scale * dL/dz; grad_bias = 0."""
    n = indices(block, BLOCK_N)
    mu, r, g, shift = _columns(mean, n, N), _columns(rstd, n, N), _columns(gamma, n, N), _columns(beta, n, N)
    negative = tl.cast(slope, tl.float32)
    by_one = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    by_xhat = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        mask = within(b, B, n, N)
        xhat = (tl.load(z + offset(b, N)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32) - mu) * r
        grad = _unpooled(grad_latents, b, n, B, N, P, cover)
        grad_u = tl.where(xhat * g + shift > 0, grad, grad * negative)
        by_one += grad_u
        by_xhat += grad_u * xhat
    dbeta, dgamma = tl.sum(by_one, 0), tl.sum(by_xhat, 0)
    tl.store(grad_beta + n, dbeta, mask=n < N)
    tl.store(grad_gamma + n, dgamma, mask=n < N)
    tl.store(grad_bias + n, tl.zeros((BLOCK_N,), tl.float32), mask=n < N)
    count = B * 1.0
    mean_grad, mean_grad_xhat = (dbeta / count)[None, :], (dgamma / count)[None, :]
    factor = g * r * tl.cast(scale, tl.float32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        mask = within(b, B, n, N)
        at = z + offset(b, N)[:, None] + n[None, :]
        xhat = (tl.load(at, mask=mask, other=0.0).to(tl.float32) - mu) * r
        grad = _unpooled(grad_latents, b, n, B, N, P, cover)
        grad_u = tl.where(xhat * g + shift > 0, grad, grad * negative)
        tl.store(at, (factor * (grad_u - (mean_grad + xhat * mean_grad_xhat))).to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "P", "cover", "ignore_index"])
def linear_grad_kernel(
    z,
    mean,
    rstd,
    gamma,
    beta,
    grad_latents,
    grad_gamma,
    grad_beta,
    grad_bias,
    slope,
    scale,
    B,
    N,
    P,
    cover,
    losses,
    target,
    loss,
    similarity,
    grad_logits,
    grad_modulation,
    K,
    classes,
    ignore_index,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_B: tl.constexpr,
    HEAD_K: tl.constexpr,
    HEAD_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of columns a program; further programs finish the head where `losses` are given."""
    pid = program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    if losses is None or pid < blocks:
        _linear_grad(
            pid,
            z,
            mean,
            rstd,
            gamma,
            beta,
            grad_latents,
            grad_gamma,
            grad_beta,
            grad_bias,
            slope,
            scale,
            B,
            N,
            P,
            cover,
            BLOCK_B,
            BLOCK_N,
        )
    else:
        finish_head(
            pid - blocks,
            losses,
            target,
            loss,
            similarity,
            grad_logits,
            grad_modulation,
            B,
            K,
            classes,
            ignore_index,
            VECTOR,
            PRECISION,
            HEAD_B,
            HEAD_K,
            HEAD_C,
        )


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale, finish=None):
    """With `finish` as `norm_grads`."""
    columns = z.contiguous()
    B, N = z.shape
    grads = tuple(new(z, N) for _ in range(3))
    config = configuration(TILES["linear_grad"], (max(B, 1), N), z)
    programs, arguments, meta, results = finishing(finish, z)
    launch(
        linear_grad_kernel,
        block_count(N, config["BLOCK_N"]) + programs,
        z.device,
        columns,
        mean,
        rstd,
        gamma,
        beta,
        grad_latents.contiguous(),
        *grads,
        float(negative_slope),
        float(scale),
        B,
        N,
        pool_size,
        cover(N, pool_size),
        *arguments,
        **meta,
        **config,
    )
    if columns is not z:
        z.copy_(columns)
    return grads + results
