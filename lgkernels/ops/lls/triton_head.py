"""Triton kernels of the head: latents x (B, d) and basis Phi (K, d) to loss and gradients.

Few rows and classes (K, C up to 32, d up to 4096): one launch, `head`, a sample a program. Up to 256 of them, and few
samples: one launch as well, `wide_head`, which walks over the rows in tiles. Else three:

    similarity        partial x Phi^T and |x|^2 of each slice of d     programs: samples, rows, slices
    loss_rows         s, logits, loss, dL/dlogits, dL/ds, rho          programs: samples
    latent_grad       dL/dx = (dL/ds Phi - xhat * rho) / |x|           programs: samples, latents; sums the loss

With a modulation matrix M two more, before and after loss_rows: `logits`, s M, and `grad_similarity`, dL/dlogits M^T.
rho = <dL/ds, s> = <dL/dlogits, logits> in every mode. The partial sums are added in a fixed order. Phi is float32, or
the bit-packed signs of the square waveform.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, offset, program_id, within
from ..common.dot import dot
from ..common.signs import unpacked


@triton.jit
def _basis(basis, k, block, K, d, PACKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows k of block number `block` of BLOCK_D columns of Phi. Past the last column some finite value."""
    j = indices(block, BLOCK_D)
    if PACKED:
        word = indices(block, BLOCK_D // 32)
        words = tl.load(
            basis + offset(k, tl.cdiv(d, 32))[:, None] + word[None, :], mask=within(k, K, word * 32, d), other=0
        )
        return tl.where(j[None, :] == 0, 0.0, unpacked(words))  # sin(0) = 0: the only zero
    else:
        return tl.load(basis + offset(k, d)[:, None] + j[None, :], mask=within(k, K, j, d), other=0.0)


@triton.jit
def _loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY: tl.constexpr):
    """Losses (rows,) and dL/dlogits (rows, classes) of logits z; the gradient is divided by `count`."""
    v = z / tl.cast(temperature, tl.float32)
    valid = label != ignore_index
    one_hot = tl.where(label[:, None] == c[None, :], 1.0, 0.0)
    if CROSS_ENTROPY:
        v = tl.where((c < C)[None, :], v, float("-inf"))
        v = v - tl.max(v, 1)[:, None]
        e = tl.exp(v)
        total = tl.sum(e, 1)
        q = one_hot * (1.0 - tl.cast(smoothing, tl.float32)) + tl.cast(smoothing, tl.float32) / C
        loss = tl.sum(tl.where((c < C)[None, :], q * (tl.log(total)[:, None] - v), 0.0), 1)
        grad_v = e / total[:, None] - q
    else:
        difference = tl.minimum(tl.maximum(v / 4 + 0.5, 0.0), 1.0) - one_hot
        loss = tl.sum(tl.where((c < C)[None, :], difference * difference, 0.0), 1) / C
        grad_v = difference * (2.0 / C)
    grad_z = tl.where(valid[:, None] & (c < C)[None, :], grad_v / (tl.cast(temperature, tl.float32) * count), 0.0)
    return tl.where(valid, loss, 0.0), grad_z


@triton.jit
def _valid_rows(target, B, ignore_index):
    """Number of targets that are not ignored, float32."""
    valid = tl.zeros((1024,), tl.int32)
    for first in range(0, B, 1024):
        b = first + tl.arange(0, 1024)
        valid += (tl.load(target + b, mask=b < B, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.sum(valid, 0).to(tl.float32)


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
        j = indices(block, BLOCK_D)
        tile = tl.load(x + offset(m, d)[:, None] + j[None, :], mask=within(m, B, j, d), other=0.0)
        products = dot(tile, tl.trans(_basis(basis, k, block, K, d, PACKED, BLOCK_D)), products, PRECISION)
        squares += tl.sum(tile * tile, 1)
    row = partial + offset(offset(slice, B) + m, K + 1)
    tl.store(row[:, None] + k[None, :], products, mask=within(m, B, k, K))
    if pid % k_blocks == 0:
        tl.store(row + K, squares, mask=m < B)
    if pid == 0:
        tl.store(count, _valid_rows(target, B, ignore_index))


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
    """|x| and the factor that turns x Phi^T into s: basis_scale, over max(|x|, eps) with NORMALIZE."""
    squares = tl.zeros((b.shape[0],), tl.float32)
    for slice in range(slices):
        squares += tl.load(
            partial + offset(offset(slice + tl.zeros_like(b), B) + b, width) + (width - 1), mask=b < B, other=0.0
        )
    norm = tl.sqrt(squares)
    factor = tl.zeros_like(norm) + tl.cast(basis_scale, tl.float32)
    if NORMALIZE:
        factor = factor / tl.maximum(norm, tl.cast(eps, tl.float32))
    return norm, factor


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
            tl.store(similarity + offset(b, K)[:, None] + k[None, :], s, mask=within(b, B, k, K))
        matrix = tl.load(modulation + offset(k, C)[:, None] + c[None, :], mask=within(k, K, c, C), other=0.0)
        z = dot(s, matrix, z, PRECISION)
    tl.store(logits + offset(b, C)[:, None] + c[None, :], z, mask=within(b, B, c, C))


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
        grad_z = tl.load(grad_logits + offset(b, C)[:, None] + c[None, :], mask=within(b, B, c, C), other=0.0)
        matrix = tl.load(modulation + offset(k, C)[:, None] + c[None, :], mask=within(k, K, c, C), other=0.0)
        grad_s = dot(grad_z, tl.trans(matrix), grad_s, PRECISION)
    tl.store(grad_similarity + offset(b, K)[:, None] + k[None, :], grad_s, mask=within(b, B, k, K))


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
    at = offset(b, C)[:, None] + c[None, :]
    inside = within(b, B, c, C)
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
    loss, grad_z = _loss(z, label, c, C, n, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        tl.store(grad_logits + at, grad_z, mask=inside)
        if vector is not None:
            tl.store(grad_similarity + at, grad_z * m, mask=inside)
        tl.store(rows + B + b, tl.sum(grad_z * z, 1), mask=b < B)


@triton.jit
def _reduce_loss(losses, count, loss, B):
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, B, 1024):
        b = start + tl.arange(0, 1024)
        total += tl.load(losses + b, mask=b < B, other=0.0)
    tl.store(loss, tl.sum(total, 0) / count)


@triton.jit(do_not_specialize=["B", "ignore_index"])
def reduce_loss_kernel(losses, target, loss, B, ignore_index, MEAN: tl.constexpr):
    """loss = sum of losses, divided by the number of rows that count with MEAN. One program."""
    count = 1.0
    if MEAN:
        count = _valid_rows(target, B, ignore_index)
    _reduce_loss(losses, count, loss, B)


@triton.jit
def _through_norm(g, x, norm, rho, eps, ZERO_BELOW: tl.constexpr):
    """dL/dx = (g - xhat * rho) / |x| of rows of x; below eps g / eps, or 0."""
    smallest = tl.cast(eps, tl.float32)
    inverse = (1.0 / tl.maximum(norm, smallest))[:, None]
    below = g * 0.0 if ZERO_BELOW else g / smallest
    return tl.where((norm >= smallest)[:, None], (g - x * inverse * rho[:, None]) * inverse, below)


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
    """g = basis_scale * dL/ds Phi; dL/dx = (g - xhat * rho) / |x|, below eps g / eps or 0; g itself without
    NORMALIZE. With REDUCE the first program sums the losses."""
    pid = program_id(0)
    d_blocks = tl.cdiv(d, BLOCK_D)
    m, block = indices(pid // d_blocks, BLOCK_M), pid % d_blocks
    g = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        grad_s = tl.load(grad_similarity + offset(m, K)[:, None] + k[None, :], mask=within(m, B, k, K), other=0.0)
        g = dot(grad_s, _basis(basis, k, block, K, d, PACKED, BLOCK_D), g, PRECISION)
    g = g * tl.cast(basis_scale, tl.float32)
    j = indices(block, BLOCK_D)
    at = offset(m, d)[:, None] + j[None, :]
    mask = within(m, B, j, d)
    if NORMALIZE:
        norm, rho = tl.load(rows + m, mask=m < B, other=1.0), tl.load(rows + B + m, mask=m < B, other=0.0)
        g = _through_norm(g, tl.load(x + at, mask=mask, other=0.0), norm, rho, eps, ZERO_BELOW)
    tl.store(grad_latents + at, g, mask=mask)
    if REDUCE:
        if pid == 0:
            n = 1.0
            if MEAN:
                n = tl.load(count)
            _reduce_loss(losses, n, loss, B)


@triton.jit
def _modulation_tile(
    tile,
    similarity,
    grad_logits,
    scale,
    grad,
    B,
    K,
    C,
    PER_ROW: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dL/dm = sum over the batch of scale * g_z * s, or dL/dM = s^T (scale * g_z), tile number `tile` of it; without
    `scale` it is 1."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    k, c = indices(tile // c_blocks, BLOCK_K), indices(tile % c_blocks, BLOCK_C)
    by_vector = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    by_matrix = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        g = tl.load(grad_logits + offset(b, C)[:, None] + c[None, :], mask=within(b, B, c, C), other=0.0)
        if scale is not None:
            if PER_ROW:
                g = g * tl.load(scale + b, mask=b < B, other=0.0).to(tl.float32)[:, None]
            else:
                g = g * tl.load(scale).to(tl.float32)
        if VECTOR:
            by_vector += g * tl.load(
                similarity + offset(b, C)[:, None] + c[None, :], mask=within(b, B, c, C), other=0.0
            )
        else:
            s = tl.load(
                similarity + offset(b, K)[None, :] + k[:, None], mask=(b < B)[None, :] & (k < K)[:, None], other=0.0
            )
            by_matrix = dot(s, g, by_matrix, PRECISION)
    if VECTOR:
        tl.store(grad + c, tl.sum(by_vector, 0), mask=c < C)
    else:
        tl.store(grad + offset(k, C)[:, None] + c[None, :], by_matrix, mask=within(k, K, c, C))


@triton.jit(do_not_specialize=["B"])
def modulation_grad_kernel(
    similarity,
    grad_logits,
    scale,
    grad,
    B,
    K,
    C,
    PER_ROW: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The modulation's gradient, a tile a program."""
    _modulation_tile(
        program_id(0),
        similarity,
        grad_logits,
        scale,
        grad,
        B,
        K,
        C,
        PER_ROW,
        VECTOR,
        PRECISION,
        BLOCK_B,
        BLOCK_K,
        BLOCK_C,
    )


@triton.jit
def finish_head(
    program,
    losses,
    target,
    loss,
    similarity,
    grad_logits,
    grad,
    B,
    K,
    C,
    ignore_index,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What a head that was told not to reduce leaves to a later launch: program 0 takes the mean of the losses, the
    others a tile of the modulation's gradient each."""
    if program == 0:
        _reduce_loss(losses, _valid_rows(target, B, ignore_index), loss, B)
    else:
        if grad is not None:
            _modulation_tile(
                program - 1,
                similarity,
                grad_logits,
                None,
                grad,
                B,
                K,
                C,
                False,
                VECTOR,
                PRECISION,
                BLOCK_B,
                BLOCK_K,
                BLOCK_C,
            )


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
    """The whole head of a few samples, for few rows and classes; all but the sum of the losses."""
    b, k, c = indices(program_id(0), BLOCK_B), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    count = 1.0
    if MEAN:
        count = _valid_rows(target, B, ignore_index)
    products = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for block in range(tl.cdiv(d, BLOCK_D)):
        j = indices(block, BLOCK_D)
        row = tl.load(x + offset(b, d)[:, None] + j[None, :], mask=within(b, B, j, d), other=0.0)
        products += row[:, None, :] * _basis(basis, k, block, K, d, PACKED, BLOCK_D)[None, :, :]
        squares += row * row
    norm = tl.sqrt(tl.sum(squares, 1))
    factor = tl.zeros_like(norm) + tl.cast(basis_scale, tl.float32)
    if NORMALIZE:
        factor = factor / tl.maximum(norm, tl.cast(eps, tl.float32))
    s = tl.where((k < K)[None, :], tl.sum(products, 2) * factor[:, None], 0.0)
    tl.store(similarity + offset(b, K)[:, None] + k[None, :], s, mask=within(b, B, k, K))

    z = s
    if MATRIX:
        m = tl.load(modulation + offset(k, C)[:, None] + c[None, :], mask=within(k, K, c, C), other=0.0)
        z = tl.sum(s[:, :, None] * m[None, :, :], 1)
    elif modulation is not None:
        v = tl.load(modulation + c, mask=c < C, other=0.0)[None, :]
        z = s * v
    label = tl.load(target + b, mask=b < B, other=ignore_index)
    loss, grad_z = _loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        tl.store(grad_logits + offset(b, C)[:, None] + c[None, :], grad_z, mask=within(b, B, c, C))
        grad_s = grad_z
        if MATRIX:
            grad_s = tl.sum(grad_z[:, None, :] * m[None, :, :], 2)
        elif modulation is not None:
            grad_s = grad_z * v
        rho = tl.sum(grad_s * s, 1)
        grad_s = grad_s * tl.cast(basis_scale, tl.float32)
        for block in range(tl.cdiv(d, BLOCK_D)):
            j = indices(block, BLOCK_D)
            at = offset(b, d)[:, None] + j[None, :]
            mask = within(b, B, j, d)
            g = tl.sum(grad_s[:, :, None] * _basis(basis, k, block, K, d, PACKED, BLOCK_D)[None, :, :], 1)
            if NORMALIZE:
                g = _through_norm(g, tl.load(x + at, mask=mask, other=0.0), norm, rho, eps, ZERO_BELOW)
            tl.store(grad_latents + at, g, mask=mask)


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
    """`head_kernel` for a row of classes in registers and more rows than fit there: s and dL/ds go through memory, a
    tile of rows at a time. A barrier makes what a program has stored visible to all of its own threads."""
    b, c = indices(program_id(0), BLOCK_B), tl.arange(0, BLOCK_C)
    count = 1.0
    if MEAN:
        count = _valid_rows(target, B, ignore_index)
    squares = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for block in range(tl.cdiv(d, BLOCK_D)):
        j = indices(block, BLOCK_D)
        row = tl.load(x + offset(b, d)[:, None] + j[None, :], mask=within(b, B, j, d), other=0.0)
        squares += row * row
    norm = tl.sqrt(tl.sum(squares, 1))
    factor = tl.zeros_like(norm) + tl.cast(basis_scale, tl.float32)
    if NORMALIZE:
        factor = factor / tl.maximum(norm, tl.cast(eps, tl.float32))

    z = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), tl.float32)
        for block in range(tl.cdiv(d, BLOCK_D)):
            j = indices(block, BLOCK_D)
            row = tl.load(x + offset(b, d)[:, None] + j[None, :], mask=within(b, B, j, d), other=0.0)
            products += row[:, None, :] * _basis(basis, k, block, K, d, PACKED, BLOCK_D)[None, :, :]
        s = tl.where((k < K)[None, :], tl.sum(products, 2) * factor[:, None], 0.0)
        tl.store(similarity + offset(b, K)[:, None] + k[None, :], s, mask=within(b, B, k, K))
        if MATRIX:
            m = tl.load(modulation + offset(k, C)[:, None] + c[None, :], mask=within(k, K, c, C), other=0.0)
            z += tl.sum(s[:, :, None] * m[None, :, :], 1)
    tl.debug_barrier()
    at_class = offset(b, C)[:, None] + c[None, :]
    class_mask = within(b, B, c, C)
    if not MATRIX:
        z = tl.load(similarity + at_class, mask=class_mask, other=0.0)
        if modulation is not None:
            v = tl.load(modulation + c, mask=c < C, other=0.0)[None, :]
            z = z * v

    label = tl.load(target + b, mask=b < B, other=ignore_index)
    loss, grad_z = _loss(z, label, c, C, count, temperature, smoothing, ignore_index, CROSS_ENTROPY)
    tl.store(losses + b, loss, mask=b < B)
    if GRAD:
        tl.store(grad_logits + at_class, grad_z, mask=class_mask)
        rho = tl.sum(grad_z * z, 1)
        if MATRIX:
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                m = tl.load(modulation + offset(k, C)[:, None] + c[None, :], mask=within(k, K, c, C), other=0.0)
                tl.store(
                    grad_similarity + offset(b, K)[:, None] + k[None, :],
                    tl.sum(grad_z[:, None, :] * m[None, :, :], 2),
                    mask=within(b, B, k, K),
                )
        elif modulation is not None:
            tl.store(grad_similarity + at_class, grad_z * v, mask=class_mask)
        tl.debug_barrier()
        for block in range(tl.cdiv(d, BLOCK_D)):
            j = indices(block, BLOCK_D)
            at = offset(b, d)[:, None] + j[None, :]
            mask = within(b, B, j, d)
            g = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                grad_s = tl.load(
                    grad_similarity + offset(b, K)[:, None] + k[None, :], mask=within(b, B, k, K), other=0.0
                )
                g += tl.sum(grad_s[:, :, None] * _basis(basis, k, block, K, d, PACKED, BLOCK_D)[None, :, :], 1)
            g = g * tl.cast(basis_scale, tl.float32)
            if NORMALIZE:
                g = _through_norm(g, tl.load(x + at, mask=mask, other=0.0), norm, rho, eps, ZERO_BELOW)
            tl.store(grad_latents + at, g, mask=mask)
