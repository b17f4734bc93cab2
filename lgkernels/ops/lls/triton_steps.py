"""Inner steps of the head that several of its Triton kernels share. b: samples, k: basis rows, c: classes."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.addressing import indices, load_tile, offset, within
from ..common.rows import cross_entropy
from ..common.signs import unpacked


class HeadResults(NamedTuple):
    """What the launches of a head write. Without gradients the last three are empty, or None."""

    losses: Tensor  # (B,)
    loss: Tensor | None  # () for all of them; None: it is not wanted
    similarity: Tensor  # (B, K)
    grad_logits: Tensor  # (B, C)
    grad_similarity: Tensor | None  # (B, K); without modulation it is grad_logits
    grad_latents: Tensor  # (B, d)


def constants(options):
    """Options that are compiled into the kernels that end a head."""
    return {"ZERO_BELOW": options.zero_gradient_below_eps, "MEAN": options.reduction == "mean"}


@triton.jit
def latent_tile(x, b, block, B, d, BLOCK_D: tl.constexpr):
    """Rows b, block number `block` of BLOCK_D columns of x."""
    return load_tile(x, b, indices(block, BLOCK_D), B, d)


@triton.jit
def basis_tile(basis, k, block, K, d, PACKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows k, block number `block` of BLOCK_D columns of Phi. Past the last column some finite value."""
    j = indices(block, BLOCK_D)
    if PACKED:
        word = indices(block, BLOCK_D // 32)
        words = tl.load(
            basis + offset(k, tl.cdiv(d, 32))[:, None] + word[None, :], mask=within(k, K, word * 32, d), other=0
        )
        return tl.where(j[None, :] == 0, 0.0, unpacked(words))  # sin(0) = 0: the only zero
    else:
        return load_tile(basis, k, j, K, d)


@triton.jit
def norm_and_factor(squares, eps, basis_scale, NORMALIZE: tl.constexpr):
    """|x|, and the factor that turns x Phi^T into s: basis_scale, over max(|x|, eps) with NORMALIZE."""
    norm = tl.sqrt(squares)
    factor = tl.zeros_like(norm) + tl.cast(basis_scale, tl.float32)
    if NORMALIZE:
        factor = factor / tl.maximum(norm, tl.cast(eps, tl.float32))
    return norm, factor


@triton.jit
def head_loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY: tl.constexpr):
    """Losses (rows,) and dL/dlogits (rows, classes) of logits z; the gradient is divided by `count`."""
    v = z / tl.cast(temperature, tl.float32)
    if CROSS_ENTROPY:
        loss, grad_v = cross_entropy(v, label, c, C, smoothing)
    else:
        one_hot = tl.where(label[:, None] == c[None, :], 1.0, 0.0)
        difference = tl.minimum(tl.maximum(v / 4 + 0.5, 0.0), 1.0) - one_hot
        loss = tl.sum(tl.where((c < C)[None, :], difference * difference, 0.0), 1) / C
        grad_v = difference * (2.0 / C)
    valid = label != ignore_index
    grad_z = tl.where(valid[:, None] & (c < C)[None, :], grad_v / (tl.cast(temperature, tl.float32) * count), 0.0)
    return tl.where(valid, loss, 0.0), grad_z


@triton.jit
def store_latent_grad(
    grad_latents,
    g,
    x,
    norm,
    rho,
    b,
    block,
    B,
    d,
    eps,
    NORMALIZE: tl.constexpr,
    ZERO_BELOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dx = (g - xhat * rho) / |x| at rows b and a block of columns, below eps g / eps, or 0; g without NORMALIZE."""
    j = indices(block, BLOCK_D)
    at, inside = offset(b, d)[:, None] + j[None, :], within(b, B, j, d)  # made once, for fewer registers
    if NORMALIZE:
        x_tile, smallest = tl.load(x + at, mask=inside, other=0.0), tl.cast(eps, tl.float32)
        inverse = (1.0 / tl.maximum(norm, smallest))[:, None]
        below = g * 0.0 if ZERO_BELOW else g / smallest
        g = tl.where((norm >= smallest)[:, None], (g - x_tile * inverse * rho[:, None]) * inverse, below)
    tl.store(grad_latents + at, g, mask=inside)


@triton.jit
def valid_rows(target, B, ignore_index):
    """Number of targets that are not ignored, float32."""
    valid = tl.zeros((1024,), tl.int32)
    for first in range(0, B, 1024):
        b = first + tl.arange(0, 1024)
        valid += (tl.load(target + b, mask=b < B, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.sum(valid, 0).to(tl.float32)


@triton.jit
def store_loss(losses, count, loss, B):
    """loss = sum of the losses / count."""
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, B, 1024):
        b = start + tl.arange(0, 1024)
        total += tl.load(losses + b, mask=b < B, other=0.0)
    tl.store(loss, tl.sum(total, 0) / count)
