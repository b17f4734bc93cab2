"""The whole head in one Triton launch, for heads whose matrix Phi is small: all but the sum of the losses.

    s = x Phi^T / |x|     z = s, s * m or s M     loss and dL/dz of a row     dL/dx = (dL/ds Phi - xhat * rho) / |x|

`head`: all basis rows and classes of a sample in registers (K, C up to 32, d up to 4096). `wide_head`: up to 256 of
them and few products (`FEW_PRODUCTS`); the classes are in registers, the basis rows go by in tiles. Its barriers make
what a program has stored visible to all of its own threads. Both multiply with plain arithmetic.
"""

import torch
import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, store_tile, within
from ..common.launch import block_count, configuration, launch
from ..common.rounding import product
from .tiles import FEW_PRODUCTS, TILES
from .triton_finish import reduce_loss
from .triton_steps import basis_tile, constants, head_loss, latent_tile, norm_and_factor, store_latent_grad, valid_rows


@triton.jit
def _count(target, B, ignore_index, MEAN: tl.constexpr):
    """What the gradient is divided by."""
    count = 1.0
    if MEAN:
        count = valid_rows(target, B, ignore_index)
    return count


@triton.jit
def _row_norm(x, b, B, d, eps, basis_scale, NORMALIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x| of rows b, and the factor that turns x Phi^T into s."""
    squares = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for block in range(tl.cdiv(d, BLOCK_D)):
        row = latent_tile(x, b, block, B, d, BLOCK_D)
        squares += row * row
    return norm_and_factor(tl.sum(squares, 1), eps, basis_scale, NORMALIZE)


@triton.jit
def _products(row, basis, k, block, K, d, PACKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of x Phi^T before its sum over the latents, (samples, basis rows, latents)."""
    return row[:, None, :] * basis_tile(basis, k, block, K, d, PACKED, BLOCK_D)[None, :, :]


@triton.jit
def _store_similarity(similarity, products, factor, b, k, B, K):
    """s (samples, basis rows), 0 past the last row; also written to memory."""
    s = tl.where((k < K)[None, :], tl.sum(products, 2) * factor[:, None], 0.0)
    store_tile(similarity, s, b, k, B, K)
    return s


@triton.jit
def _times(s, m):
    """s M, (samples, classes), of a tile of basis rows."""
    return tl.sum(product(s[:, :, None], m[None, :, :]), 1)


@triton.jit
def _times_transposed(grad_z, m):
    """dL/ds = dL/dz M^T, (samples, basis rows)."""
    return tl.sum(product(grad_z[:, None, :], m[None, :, :]), 2)


@triton.jit
def _back_through_rows(grad_s, basis, k, block, K, d, PACKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """dL/ds Phi over basis rows k, (samples, latents) of a block."""
    tile = basis_tile(basis, k, block, K, d, PACKED, BLOCK_D)
    return tl.sum(product(grad_s[:, :, None], tile[None, :, :]), 1)


@triton.jit(do_not_specialize=["B", "ignore_index"])
def head_kernel(
    x,
    basis,
    target,
    modulation,
    losses,
    similarity,
    grad_logits,
    grad_latents,
    B,
    d,
    K,
    C,
    temperature,
    smoothing,
    eps,
    basis_scale,
    ignore_index,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZERO_BELOW: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    MATRIX: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The whole head of a few samples, for few rows and classes."""
    b, k, c = indices(program_id(0), BLOCK_B), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    count = _count(target, B, ignore_index, MEAN)
    products = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for block in range(tl.cdiv(d, BLOCK_D)):
        row = latent_tile(x, b, block, B, d, BLOCK_D)
        products += _products(row, basis, k, block, K, d, PACKED, BLOCK_D)
        squares += row * row
    norm, factor = norm_and_factor(tl.sum(squares, 1), eps, basis_scale, NORMALIZE)
    s = _store_similarity(similarity, products, factor, b, k, B, K)

    z = s
    if MATRIX:
        m = load_tile(modulation, k, c, K, C)
        z = _times(s, m)
    elif modulation is not None:
        v = tl.load(modulation + c, mask=c < C, other=0.0)[None, :]
        z = s * v
    label = tl.load(target + b, mask=b < B, other=ignore_index)
    loss, grad_z = head_loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        store_tile(grad_logits, grad_z, b, c, B, C)
        grad_s = grad_z
        if MATRIX:
            grad_s = _times_transposed(grad_z, m)
        elif modulation is not None:
            grad_s = grad_z * v
        rho = tl.sum(product(grad_s, s), 1)
        grad_s = grad_s * tl.cast(basis_scale, tl.float32)
        for block in range(tl.cdiv(d, BLOCK_D)):
            g = _back_through_rows(grad_s, basis, k, block, K, d, PACKED, BLOCK_D)
            store_latent_grad(grad_latents, g, x, norm, rho, b, block, B, d, eps, NORMALIZE, ZERO_BELOW, BLOCK_D)


@triton.jit
def _similarities_by_tiles(
    x,
    basis,
    modulation,
    similarity,
    factor,
    b,
    c,
    B,
    d,
    K,
    C,
    PACKED: tl.constexpr,
    MATRIX: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """s to memory, a tile of basis rows at a time. Returns s M with a modulation matrix, else zeros."""
    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), tl.float32)
        for block in range(tl.cdiv(d, BLOCK_D)):
            row = latent_tile(x, b, block, B, d, BLOCK_D)
            products += _products(row, basis, k, block, K, d, PACKED, BLOCK_D)
        s = _store_similarity(similarity, products, factor, b, k, B, K)
        if MATRIX:
            z += _times(s, load_tile(modulation, k, c, K, C))
    return z


@triton.jit
def _back_by_tiles(
    grad_similarity,
    basis,
    b,
    block,
    B,
    d,
    K,
    basis_scale,
    PACKED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """basis_scale * dL/ds Phi, (samples, latents) of a block, from the tiles of dL/ds in memory."""
    g = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        grad_s = load_tile(grad_similarity, b, k, B, K)
        g += _back_through_rows(grad_s, basis, k, block, K, d, PACKED, BLOCK_D)
    return g * tl.cast(basis_scale, tl.float32)


@triton.jit(do_not_specialize=["B", "ignore_index"])
def wide_head_kernel(
    x,
    basis,
    target,
    modulation,
    losses,
    similarity,
    grad_logits,
    grad_similarity,
    grad_latents,
    B,
    d,
    K,
    C,
    temperature,
    smoothing,
    eps,
    basis_scale,
    ignore_index,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZERO_BELOW: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    MATRIX: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`head_kernel` for a row of classes in registers and more basis rows than fit there: s and dL/ds go through
    memory."""
    b, c = indices(program_id(0), BLOCK_B), tl.arange(0, BLOCK_C)
    count = _count(target, B, ignore_index, MEAN)
    norm, factor = _row_norm(x, b, B, d, eps, basis_scale, NORMALIZE, BLOCK_B, BLOCK_D)
    z = _similarities_by_tiles(
        x, basis, modulation, similarity, factor, b, c, B, d, K, C, PACKED, MATRIX, BLOCK_B, BLOCK_K, BLOCK_C, BLOCK_D
    )
    tl.debug_barrier()
    at_class, class_mask = offset(b, C)[:, None] + c[None, :], within(b, B, c, C)  # made once, for fewer registers
    if not MATRIX:
        z = tl.load(similarity + at_class, mask=class_mask, other=0.0)
        if modulation is not None:
            v = tl.load(modulation + c, mask=c < C, other=0.0)[None, :]
            z = z * v

    label = tl.load(target + b, mask=b < B, other=ignore_index)
    loss, grad_z = head_loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        tl.store(grad_logits + at_class, grad_z, mask=class_mask)
        rho = tl.sum(product(grad_z, z), 1)
        if MATRIX:
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                grad_s = _times_transposed(grad_z, load_tile(modulation, k, c, K, C))
                store_tile(grad_similarity, grad_s, b, k, B, K)
        elif modulation is not None:
            tl.store(grad_similarity + at_class, grad_z * v, mask=class_mask)
        tl.debug_barrier()
        for block in range(tl.cdiv(d, BLOCK_D)):
            g = _back_by_tiles(
                grad_similarity, basis, b, block, B, d, K, basis_scale, PACKED, BLOCK_B, BLOCK_K, BLOCK_D
            )
            store_latent_grad(grad_latents, g, x, norm, rho, b, block, B, d, eps, NORMALIZE, ZERO_BELOW, BLOCK_D)


def fused_kernel(batch, dim, rows, classes):
    """Name of the kernel that computes the whole head of a sample in one program; None: it takes several launches."""
    if max(rows, classes) <= 32 and dim <= 4096:
        return "head"
    if max(rows, classes) <= 256 and batch * dim * rows <= FEW_PRODUCTS:
        return "wide_head"
    return None


def fused_head(name, x, target, modulation, basis, options, compute_grad, out):
    """One launch of the kernel `name`, and one for the sum; `out`: what they write (`HeadResults`)."""
    (B, d), K, C = x.shape, basis.shape[0], options.num_classes
    config = configuration(TILES[name], (B, d, K, C), x)
    kernel, through_memory = (head_kernel, ()) if name == "head" else (wide_head_kernel, (out.grad_similarity,))
    launch(
        kernel,
        block_count(B, config["BLOCK_B"]),
        x.device,
        x,
        basis,
        target,
        modulation,
        out.losses,
        out.similarity,
        out.grad_logits,
        *through_memory,
        out.grad_latents,
        B,
        d,
        K,
        C,
        float(options.temperature),
        float(options.label_smoothing),
        float(options.eps),
        float(options.basis_scale),
        options.ignore_index,
        PACKED=basis.dtype == torch.int32,
        NORMALIZE=options.normalize,
        CROSS_ENTROPY=options.loss == "cross_entropy",
        **constants(options),
        MATRIX=modulation is not None and modulation.dim() == 2,
        GRAD=compute_grad,
        **config,
    )
    if out.loss is not None:
        reduce_loss(out.losses, target, out.loss, options)
