"""The convolution block's passes in Triton: normalise + activate + pool, and the gradients of the norm and before it.

Maps are read bin by bin (triton_bins.py).
"""

import torch
import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id, within
from ..common.launch import block_count, configuration, launch, new
from .tiles import TILES
from .triton_bins import (
    bin_gradient,
    bin_layout,
    bin_of_program,
    bin_programs,
    bin_range,
    cover,
    dense,
    elements,
    larger,
    normalization,
    owned_positions,
    unpooled,
)
from .triton_finish import finish_head, finishing


@triton.jit(do_not_specialize=["B", "H", "W", "P"])
def norm_act_pool_kernel(
    z,
    out,
    latents,
    s1,
    s2,
    mean,
    rstd,
    gamma,
    beta,
    slope,
    B,
    C,
    H,
    W,
    P,
    NORM: tl.constexpr,
    GRAD: tl.constexpr,
    WINDOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """a = leaky_relu(gamma * (z - mean) * rstd + beta), or z itself without NORM; per bin the mean of a and the sums
    of lambda and lambda * xhat. Positions are visited in WINDOW x WINDOW groups, whose maximum is the output; with RUN
    the columns of neighbouring groups are loaded as one run, SPAN of them a group."""
    SPAN: tl.constexpr = WINDOW if RUN > 1 else 1
    STEP: tl.constexpr = WINDOW // SPAN  # columns from one load of a group to the next
    i, j, plane = bin_of_program(P, BLOCK_C)
    top, bottom, next_top = bin_range(i, H, P)
    left, right, next_left = bin_range(j, W, P)
    exists = plane < B * C
    if NORM:
        mu, r, g, shift = normalization(mean, rstd, gamma, beta, plane % C, exists)
        negative = tl.cast(slope, tl.float32)
    row0, column0 = top // WINDOW, left // WINDOW
    rows, columns = (bottom - 1) // WINDOW + 1 - row0, (right - 1) // WINDOW + 1 - column0
    width = columns * SPAN
    count = tl.multiple_of(rows * width, RUN)
    sum_a = tl.zeros((BLOCK_P * SPAN, BLOCK_C), tl.float32)
    sum_lambda = tl.zeros((BLOCK_P * SPAN, BLOCK_C), tl.float32)
    sum_xhat = tl.zeros((BLOCK_P * SPAN, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_P * SPAN):
        p = start + tl.arange(0, BLOCK_P * SPAN)
        row, column = row0 + p // width, column0 * SPAN + p % width
        inside = p < count
        largest = tl.full((BLOCK_P * SPAN, BLOCK_C), float("-inf"), tl.float32)
        for dy in tl.static_range(WINDOW):
            for dx in tl.static_range(STEP):
                h, w = row * WINDOW + dy, column * STEP + dx
                if WINDOW == 1 or RUN > 1:
                    valid = inside
                    member = valid[:, None]
                else:
                    valid = inside & (h < H) & (w < W)
                    member = (valid & (h >= top) & (h < bottom) & (w >= left) & (w < right))[:, None]
                value = tl.load(
                    z + elements(plane, h, w, C, H, W, CHANNELS_LAST, RUN),
                    mask=valid[:, None] & exists[None, :],
                    other=0.0,
                ).to(tl.float32)
                if NORM:
                    xhat = (value - mu) * r
                    u = xhat * g + shift
                    slope_here = tl.where(u > 0, 1.0, negative)
                    a = u * slope_here
                    if WINDOW == 1:
                        largest = a
                    else:
                        largest = larger(a, largest)
                    sum_a += tl.where(member, a, 0.0)
                    if GRAD:
                        sum_lambda += tl.where(member, slope_here, 0.0)
                        sum_xhat += tl.where(member, slope_here * xhat, 0.0)
                else:
                    sum_a += tl.where(member, value, 0.0)
        if NORM:
            if SPAN > 1:  # from columns to groups
                left_column, right_column = tl.split(tl.permute(tl.reshape(largest, (BLOCK_P, 2, BLOCK_C)), (0, 2, 1)))
                largest = larger(right_column, left_column)
                p = start // SPAN + tl.arange(0, BLOCK_P)
                row, column = row0 + p // columns, column0 + p % columns
                inside = p < tl.multiple_of(rows * columns, RUN // SPAN)
            if RUN > 1:  # exact tiling: all are owned, in aligned runs
                owned = inside
            else:
                owned = (
                    inside
                    & (row * WINDOW >= top)
                    & (row * WINDOW < next_top)
                    & (row < H // WINDOW)
                    & (column * WINDOW >= left)
                    & (column * WINDOW < next_left)
                    & (column < W // WINDOW)
                )
            to = elements(plane, row, column, C, H // WINDOW, W // WINDOW, CHANNELS_LAST, RUN // SPAN)
            tl.store(out + to, largest.to(out.dtype.element_ty), mask=owned[:, None] & exists[None, :])
    to = offset(plane, P * P) + (i * P + j)
    area = (bottom - top) * (right - left) * 1.0
    tl.store(latents + to, tl.sum(sum_a, 0) / area, mask=exists)
    if GRAD:
        tl.store(s1 + to, tl.sum(sum_lambda, 0), mask=exists)
        tl.store(s2 + to, tl.sum(sum_xhat, 0), mask=exists)


def pool_maps(z, norm, negative_slope, pool_size, window, compute_grad):
    """`(out, latents, s1, s2)`; norm: (mean, rstd, gamma, beta), or None: no norm, no activation and no `out`."""
    z, channels_last = dense(z)
    B, C, H, W = z.shape
    memory_format = torch.channels_last if channels_last and not z.is_contiguous() else torch.contiguous_format
    out = s1 = s2 = None
    if norm:
        out = torch.empty((B, C, H // window, W // window), dtype=z.dtype, device=z.device, memory_format=memory_format)
    latents = new(z, B, C * pool_size**2)
    if compute_grad:
        s1, s2 = torch.empty_like(latents), torch.empty_like(latents)
    run, positions = bin_layout(z.shape, pool_size, channels_last, window)
    config = configuration(TILES["norm_act_pool"], (positions, B * C, channels_last, window > 1), z)
    launch(
        norm_act_pool_kernel,
        bin_programs(z.shape, pool_size, config),
        z.device,
        z,
        out,
        latents,
        s1,
        s2,
        *(norm or (None,) * 4),
        negative_slope,
        B,
        C,
        H,
        W,
        pool_size,
        NORM=bool(norm),
        GRAD=compute_grad,
        WINDOW=window,
        CHANNELS_LAST=channels_last,
        RUN=run,
        **config,
    )
    return out, latents, s1, s2


@triton.jit
def _norm_grads(
    block,
    grad_latents,
    s1,
    s2,
    area,
    grad_gamma,
    grad_beta,
    grad_bias,
    B,
    C,
    positions,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dgamma, dbeta = sums over batch and bins of grad/area * s2, * s1, for a block of channels; grad_bias = 0."""
    c = indices(block, BLOCK_C)
    by_s1 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    by_s2 = tl.zeros((BLOCK_B, BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        size = tl.load(area + p, mask=p < positions, other=1.0).to(tl.float32)[None, None, :]
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            at = offset(offset(b, C)[:, None] + c[None, :], positions)[:, :, None] + p[None, None, :]
            mask = (within(b, B, c, C))[:, :, None] & (p < positions)[None, None, :]
            g = tl.load(grad_latents + at, mask=mask, other=0.0) / size
            by_s1 += g * tl.load(s1 + at, mask=mask, other=0.0)
            by_s2 += g * tl.load(s2 + at, mask=mask, other=0.0)
    tl.store(grad_beta + c, tl.sum(tl.sum(by_s1, 2), 0), mask=c < C)
    tl.store(grad_gamma + c, tl.sum(tl.sum(by_s2, 2), 0), mask=c < C)
    tl.store(grad_bias + c, tl.zeros((BLOCK_C,), tl.float32), mask=c < C)


@triton.jit(do_not_specialize=["B", "C", "positions", "ignore_index"])
def norm_grads_kernel(
    grad_latents,
    s1,
    s2,
    area,
    grad_gamma,
    grad_beta,
    grad_bias,
    B,
    C,
    positions,
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
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A block of channels a program; further programs finish the head where `losses` are given."""
    pid = program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    if losses is None or pid < blocks:
        _norm_grads(
            pid,
            grad_latents,
            s1,
            s2,
            area,
            grad_gamma,
            grad_beta,
            grad_bias,
            B,
            C,
            positions,
            BLOCK_B,
            BLOCK_C,
            BLOCK_P,
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


def norm_grads(grad_latents, s1, s2, channels, area, finish=None):
    """With `finish` (see `finishing`) also the loss and the gradient of the modulation, after the other three."""
    B, positions = grad_latents.shape[0], area.numel()
    grads = tuple(new(s1, channels) for _ in range(3))
    config = configuration(TILES["norm_grads"], (max(B, 1), channels, positions), s1)
    programs, arguments, meta, results = finishing(finish, s1)
    launch(
        norm_grads_kernel,
        block_count(channels, config["BLOCK_C"]) + programs,
        s1.device,
        grad_latents.contiguous(),
        s1.contiguous(),
        s2.contiguous(),
        area.contiguous(),
        *grads,
        B,
        channels,
        positions,
        *arguments,
        **meta,
        **config,
    )
    return grads + results


@triton.jit(do_not_specialize=["B", "H", "W", "P"])
def grad_preactivation_kernel(
    z,
    mean,
    rstd,
    gamma,
    beta,
    grad_latents,
    grad_gamma,
    grad_beta,
    slope,
    scale,
    inverse_count,
    B,
    C,
    H,
    W,
    P,
    COVER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z <- scale * gamma * rstd * (lambda * g - (dbeta + xhat * dgamma) / N), g = unpool(grad_latents)."""
    i, j, plane = bin_of_program(P, BLOCK_C)
    top, left, columns, count = owned_positions(i, j, H, W, P, RUN)
    exists = plane < B * C
    mu, r, g, shift = normalization(mean, rstd, gamma, beta, plane % C, exists)
    share = tl.cast(inverse_count, tl.float32)
    mean_grad = (tl.load(grad_beta + plane % C, mask=exists, other=0.0) * share)[None, :]
    mean_grad_xhat = (tl.load(grad_gamma + plane % C, mask=exists, other=0.0) * share)[None, :]
    factor = g * r * tl.cast(scale, tl.float32)
    negative = tl.cast(slope, tl.float32)
    if COVER == 1:
        grad = bin_gradient(grad_latents, plane, exists, i, j, H, W, P)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = top + p // columns, left + p % columns
        at = z + elements(plane, row, column, C, H, W, CHANNELS_LAST, RUN)
        mask = (p < count)[:, None] & exists[None, :]
        xhat = (tl.load(at, mask=mask, other=0.0).to(tl.float32) - mu) * r
        if COVER > 1:
            grad = unpooled(grad_latents, plane, exists, i, j, row, column, H, W, P, COVER)
        grad_u = tl.where(xhat * g + shift > 0, grad, grad * negative)
        result = factor * (grad_u - (mean_grad + xhat * mean_grad_xhat))
        tl.store(at, result.to(z.dtype.element_ty), mask=mask)


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    if z.numel() == 0:
        return z
    maps, channels_last = dense(z)
    B, C, H, W = z.shape
    run, positions = bin_layout(z.shape, pool_size, channels_last)
    config = configuration(TILES["grad_preactivation"], (positions, B * C, channels_last, False), z)
    launch(
        grad_preactivation_kernel,
        bin_programs(z.shape, pool_size, config),
        z.device,
        maps,
        mean,
        rstd,
        gamma,
        beta,
        grad_latents.contiguous(),
        grad_gamma,
        grad_beta,
        float(negative_slope),
        float(scale),
        1.0 / (B * H * W),
        B,
        C,
        H,
        W,
        pool_size,
        COVER=max(cover(H, pool_size), cover(W, pool_size)),
        CHANNELS_LAST=channels_last,
        RUN=run,
        **config,
    )
    return z if maps is z else z.copy_(maps)
