"""The head in Triton: latents x (B, d) and basis Phi (K, d) to loss and gradients, in three launches.

    similarity        partial x Phi^T and |x|^2 of each slice of d     programs: samples, rows, slices
    loss_rows         s, logits, loss, dL/dlogits, dL/ds, rho          programs: samples
    latent_grad       dL/dx = (dL/ds Phi - xhat * rho) / |x|           programs: samples, latents; sums the loss

With a modulation matrix M two more, before and after loss_rows: `logits`, s M, and `grad_similarity`, dL/dlogits M^T.
rho = <dL/ds, s> = <dL/dlogits, logits> in every mode. The partial sums are added in a fixed order. Phi is float32, or
the bit-packed signs of the square waveform. Small heads take one launch: triton_fused_head.py.
"""

import torch
import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, store_tile, within
from ..common.dot import dot, float32_precision
from ..common.launch import block_count, configuration, launch, new
from ..common.rounding import product
from .tiles import TILES
from .triton_finish import reduce_loss
from .triton_steps import (
    basis_tile,
    constants,
    head_loss,
    latent_tile,
    norm_and_factor,
    store_latent_grad,
    store_loss,
    valid_rows,
)


@triton.jit(do_not_specialize=["B", "ignore_index", "slices"])
def similarity_kernel(
    x,
    basis,
    target,
    partial,
    count,
    B,
    d,
    K,
    slices,
    ignore_index,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial[slice, b, k] = x Phi^T over every `slices`-th block of columns, partial[slice, b, K] = |x|^2 over them.
    The first program also counts the targets that are not ignored."""
    pid = program_id(0)
    k_blocks = tl.cdiv(K, BLOCK_K)
    m_blocks = tl.cdiv(B, BLOCK_M)
    k, m = indices(pid % k_blocks, BLOCK_K), indices(pid // k_blocks % m_blocks, BLOCK_M)
    slice = pid // k_blocks // m_blocks
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for block in range(slice, tl.cdiv(d, BLOCK_D), slices):
        tile = latent_tile(x, m, block, B, d, BLOCK_D)
        products = dot(tile, tl.trans(basis_tile(basis, k, block, K, d, PACKED, BLOCK_D)), products, PRECISION)
        squares += tl.sum(product(tile, tile), 1)
    row = partial + offset(offset(slice, B) + m, K + 1)
    tl.store(row[:, None] + k[None, :], products, mask=within(m, B, k, K))
    if pid % k_blocks == 0:
        tl.store(row + K, squares, mask=m < B)
    if pid == 0:
        tl.store(count, valid_rows(target, B, ignore_index))


@triton.jit
def _sum_slices(partial, b, k, B, width, slices):
    """Rows b, columns k of the sum over slices, in order; columns up to `width` - 1."""
    total = tl.zeros((b.shape[0], k.shape[0]), tl.float32)
    for slice in range(slices):
        total += tl.load(
            partial + offset(offset(slice + tl.zeros_like(b), B) + b, width)[:, None] + k[None, :],
            mask=within(b, B, k, width - 1),
            other=0.0,
        )
    return total


@triton.jit
def _norms(partial, b, B, width, slices, eps, basis_scale, NORMALIZE: tl.constexpr):
    """|x| and the factor that turns x Phi^T into s (`norm_and_factor`), from the slices' sums of squares."""
    squares = tl.zeros((b.shape[0],), tl.float32)
    for slice in range(slices):
        squares += tl.load(
            partial + offset(offset(slice + tl.zeros_like(b), B) + b, width) + (width - 1), mask=b < B, other=0.0
        )
    return norm_and_factor(squares, eps, basis_scale, NORMALIZE)


@triton.jit(do_not_specialize=["B", "K", "slices"])
def logits_kernel(
    partial,
    modulation,
    similarity,
    logits,
    rows,
    B,
    K,
    C,
    slices,
    eps,
    basis_scale,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits = s M for a block of classes; the first block also writes s and rows[0] = |x|."""
    pid = program_id(0)
    blocks = tl.cdiv(C, BLOCK_N)
    b, c = indices(pid // blocks, BLOCK_M), indices(pid % blocks, BLOCK_N)
    norm, factor = _norms(partial, b, B, K + 1, slices, eps, basis_scale, NORMALIZE)
    if pid % blocks == 0:
        tl.store(rows + b, norm, mask=b < B)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        s = _sum_slices(partial, b, k, B, K + 1, slices) * factor[:, None]
        if pid % blocks == 0:
            store_tile(similarity, s, b, k, B, K)
        z = dot(s, load_tile(modulation, k, c, K, C), z, PRECISION)
    store_tile(logits, z, b, c, B, C)


@triton.jit(do_not_specialize=["B", "C", "ignore_index", "slices"])
def loss_rows_kernel(
    partial,
    target,
    vector,
    logits,
    count,
    similarity,
    grad_logits,
    grad_similarity,
    rows,
    losses,
    B,
    C,
    slices,
    temperature,
    smoothing,
    eps,
    basis_scale,
    ignore_index,
    NORMALIZE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """losses[b], dL/dlogits, rows[1] = rho. The logits are given (matrix), or computed here: s, or s * vector; then
    this also writes s, rows[0] = |x| and, with a vector, dL/ds = dL/dlogits * vector."""
    b, c = indices(program_id(0), BLOCK_B), tl.arange(0, BLOCK_C)
    at, inside = offset(b, C)[:, None] + c[None, :], within(b, B, c, C)
    if logits is not None:
        z = tl.load(logits + at, mask=inside, other=0.0)
    else:
        norm, factor = _norms(partial, b, B, C + 1, slices, eps, basis_scale, NORMALIZE)
        z = _sum_slices(partial, b, c, B, C + 1, slices) * factor[:, None]
        tl.store(similarity + at, z, mask=inside)
        if vector is not None:
            m = tl.load(vector + c, mask=c < C, other=0.0)[None, :]
            z = z * m
        if GRAD:
            tl.store(rows + b, norm, mask=b < B)

    n = 1.0
    if MEAN:
        n = tl.load(count)
    label = tl.load(target + b, mask=b < B, other=ignore_index)
    loss, grad_z = head_loss(z, label, c, C, n, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        tl.store(grad_logits + at, grad_z, mask=inside)
        if vector is not None:
            tl.store(grad_similarity + at, grad_z * m, mask=inside)
        tl.store(rows + B + b, tl.sum(product(grad_z, z), 1), mask=b < B)


@triton.jit(do_not_specialize=["B", "K"])
def grad_similarity_kernel(
    grad_logits,
    modulation,
    grad_similarity,
    B,
    K,
    C,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dL/ds = dL/dlogits M^T for a block of basis rows."""
    pid = program_id(0)
    blocks = tl.cdiv(K, BLOCK_N)
    b, k = indices(pid // blocks, BLOCK_M), indices(pid % blocks, BLOCK_N)
    grad_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        grad_z, matrix = load_tile(grad_logits, b, c, B, C), load_tile(modulation, k, c, K, C)
        grad_s = dot(grad_z, tl.trans(matrix), grad_s, PRECISION)
    store_tile(grad_similarity, grad_s, b, k, B, K)


@triton.jit(do_not_specialize=["B"])
def latent_grad_kernel(
    x,
    basis,
    grad_similarity,
    rows,
    losses,
    count,
    loss,
    grad_latents,
    B,
    d,
    K,
    eps,
    basis_scale,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZERO_BELOW: tl.constexpr,
    REDUCE: tl.constexpr,
    MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dx from g = basis_scale * dL/ds Phi. With REDUCE the first program sums the losses."""
    pid = program_id(0)
    d_blocks = tl.cdiv(d, BLOCK_D)
    m, block = indices(pid // d_blocks, BLOCK_M), pid % d_blocks
    g = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        grad_s = load_tile(grad_similarity, m, k, B, K)
        g = dot(grad_s, basis_tile(basis, k, block, K, d, PACKED, BLOCK_D), g, PRECISION)
    g = g * tl.cast(basis_scale, tl.float32)
    norm, rho = tl.load(rows + m, mask=m < B, other=1.0), tl.load(rows + B + m, mask=m < B, other=0.0)
    store_latent_grad(grad_latents, g, x, norm, rho, m, block, B, d, eps, NORMALIZE, ZERO_BELOW, BLOCK_D)
    if REDUCE:
        if pid == 0:
            n = 1.0
            if MEAN:
                n = tl.load(count)
            store_loss(losses, n, loss, B)


def head_in_steps(x, target, modulation, basis, options, compute_grad, out):
    """The three launches, five with a modulation matrix; `out`: what they write (`HeadResults`)."""
    (B, d), K, C = x.shape, basis.shape[0], options.num_classes
    eps, basis_scale = float(options.eps), float(options.basis_scale)
    packed, precision, normalize = basis.dtype == torch.int32, float32_precision(), options.normalize
    matrix = modulation is not None and modulation.dim() == 2

    config = configuration(TILES["similarity"], (B, d, K), x)
    programs = block_count(B, config["BLOCK_M"]) * block_count(K, config["BLOCK_K"])
    slices = min(block_count(d, config["BLOCK_D"]), block_count(256, programs), 16)
    partial, rows, count = new(x, slices, B, K + 1), new(x, 2, B), new(x, 1)
    launch(
        similarity_kernel,
        programs * slices,
        x.device,
        x,
        basis,
        target,
        partial,
        count,
        B,
        d,
        K,
        slices,
        options.ignore_index,
        PACKED=packed,
        PRECISION=precision,
        **config,
    )

    logits = None
    if matrix:
        logits = new(x, B, C)
        config = configuration(TILES["logits"], (B, C, K), x)
        programs = block_count(B, config["BLOCK_M"]) * block_count(C, config["BLOCK_N"])
        sizes = B, K, C, slices, eps, basis_scale
        modes = dict(NORMALIZE=normalize, PRECISION=precision)
        launch(
            logits_kernel,
            programs,
            x.device,
            partial,
            modulation,
            out.similarity,
            logits,
            rows,
            *sizes,
            **modes,
            **config,
        )

    config = configuration(TILES["loss_rows"], (B, C), x)
    launch(
        loss_rows_kernel,
        block_count(B, config["BLOCK_B"]),
        x.device,
        partial,
        target,
        None if matrix else modulation,
        logits,
        count,
        out.similarity,
        out.grad_logits,
        out.grad_similarity,
        rows,
        out.losses,
        B,
        C,
        slices,
        float(options.temperature),
        float(options.label_smoothing),
        eps,
        basis_scale,
        options.ignore_index,
        NORMALIZE=normalize,
        CROSS_ENTROPY=options.loss == "cross_entropy",
        MEAN=options.reduction == "mean",
        GRAD=compute_grad,
        **config,
    )
    if not compute_grad:
        if out.loss is not None:
            reduce_loss(out.losses, target, out.loss, options)
        return

    if matrix:
        config = configuration(TILES["grad_similarity"], (B, K, C), x)
        programs = block_count(B, config["BLOCK_M"]) * block_count(K, config["BLOCK_N"])
        tensors = out.grad_logits, modulation, out.grad_similarity
        launch(grad_similarity_kernel, programs, x.device, *tensors, B, K, C, PRECISION=precision, **config)

    config = configuration(TILES["latent_grad"], (B, d, K), x)
    launch(
        latent_grad_kernel,
        block_count(B, config["BLOCK_M"]) * block_count(d, config["BLOCK_D"]),
        x.device,
        x,
        basis,
        out.grad_similarity,
        rows,
        out.losses,
        count,
        out.losses if out.loss is None else out.loss,
        out.grad_latents,
        B,
        d,
        K,
        eps,
        basis_scale,
        PACKED=packed,
        NORMALIZE=normalize,
        REDUCE=out.loss is not None,
        **constants(options),
        PRECISION=precision,
        **config,
    )
