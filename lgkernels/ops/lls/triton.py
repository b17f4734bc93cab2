"""LLS in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

Kernels in triton_norm.py (convolution block), triton_linear.py and triton_head.py; block sizes in tiles.py.
Half inputs are widened on load, everything is computed in float32 and rounded once on store; sums have a fixed order.
CPU tensors work under TRITON_INTERPRET=1.
"""

from functools import lru_cache

import torch

from ...core.tiles import architecture, power_of_two, select
from ..common.dot import float32_precision
from ..common.launch import launch
from . import triton_head, triton_linear, triton_norm
from .options import Capabilities
from .tiles import TILES

CAPABILITIES = Capabilities(packed_basis=True, finishes_head=True)

# Products of a head up to which a layer saves two launches (four with a matrix); larger ones take three, on the tensor
# cores. Chosen by counting operations (some fifty microseconds of a GPU's plain arithmetic, beside a layer's
# convolutions of milliseconds at that batch), not measured.
_FEW_PRODUCTS = 1 << 28

_LONGEST_RUN = 8  # elements of the widest load, 16 bytes in half precision


def _config(op, sizes, tensor):
    return select(TILES[op], sizes, tensor.dtype, architecture(tensor.device))


def _blocks(n, block):
    return -(-n // block)


def _dense(z):
    """`(z, channels_last)`: z itself where it is dense in NCHW or channels_last order (or 2-D rows), else a copy."""
    if z.dim() == 4 and z.shape[1] > 1 and z.is_contiguous(memory_format=torch.channels_last):
        return z, True
    return z.contiguous(), z.dim() == 2


@lru_cache(maxsize=1024)
def _widest(size, pool):
    """Positions of the largest bin."""
    return max(-(-(i + 1) * size // pool) - i * size // pool for i in range(pool)) if size % pool else size // pool


def _cover(size, pool):
    """Largest number of bins that share a position."""
    return _widest(pool, size)


def _cover2(shape, pool):
    return max(_cover(shape[2], pool), _cover(shape[3], pool))


def _bin_layout(shape, pool_size, channels_last, window):
    """`(RUN, largest number of positions of a bin)`. RUN > 1 where bins tile the map exactly and the columns of each
    come in aligned runs of RUN contiguous elements."""
    height, width = shape[2:]
    run = 1
    if not channels_last and window == 1 and height % pool_size == 0 and width % pool_size == 0:
        bin_width = width // pool_size
        run = min(bin_width & -bin_width, _LONGEST_RUN)
    return run, _blocks(_widest(height, pool_size), window) * _blocks(_widest(width, pool_size), window)


def _planes(tensor):
    planes = tensor.shape[0] * tensor.shape[1]
    if planes >= 2**31:
        raise ValueError(f"batch * channels must be below 2^31, got {planes}: split the batch")
    return planes


def _pool(z, stats, negative_slope, pool_size, window, grad):
    z, channels_last = _dense(z)
    B, C, H, W = z.shape
    memory_format = torch.channels_last if channels_last and not z.is_contiguous() else torch.contiguous_format
    wide = torch.float32
    out = s1 = s2 = None
    if stats:
        out = torch.empty((B, C, H // window, W // window), dtype=z.dtype, device=z.device, memory_format=memory_format)
    latents = torch.empty((B, C * pool_size**2), dtype=wide, device=z.device)
    if grad:
        s1, s2 = torch.empty_like(latents), torch.empty_like(latents)
    run, positions = _bin_layout(z.shape, pool_size, channels_last, window)
    config = _config("norm_act_pool", (positions, B * C, channels_last, window > 1), z)
    programs = pool_size**2 * _blocks(_planes(z), config["BLOCK_C"])
    if programs:
        launch(
            triton_norm.norm_act_pool_kernel,
            programs,
            z.device,
            z,
            out,
            latents,
            s1,
            s2,
            *(stats or (None,) * 4),
            negative_slope,
            B,
            C,
            H,
            W,
            pool_size,
            NORM=bool(stats),
            GRAD=grad,
            WINDOW=window,
            CHANNELS_LAST=channels_last,
            RUN=run,
            **config,
        )
    return out, latents, s1, s2


def _linear_pool(z, stats, negative_slope, pool_size):
    z = z.contiguous()
    B, N = z.shape
    out = torch.empty_like(z) if stats else None
    latents = torch.empty((B, pool_size), dtype=torch.float32, device=z.device)
    config = _config("linear_pool", (B, pool_size), z)
    programs = _blocks(B, config["BLOCK_B"]) * _blocks(pool_size, config["BLOCK_N"])
    if programs:
        launch(
            triton_linear.linear_pool_kernel,
            programs,
            z.device,
            z,
            out,
            latents,
            *(stats or (None,) * 4),
            negative_slope,
            B,
            N,
            pool_size,
            _widest(N, pool_size),
            NORM=bool(stats),
            **config,
        )
    return out, latents


def latents(activation, pool_size):
    if activation.dim() == 2:
        return _linear_pool(activation, None, 0.0, pool_size)[1]
    return _pool(activation, None, 0.0, pool_size, 1, False)[1]


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    stats, slope = (mean, rstd, gamma, beta), float(negative_slope)
    empty = mean.new_empty(0)
    if z.dim() == 2:
        return *_linear_pool(z, stats, slope, pool_size), empty, mean.new_empty(0)
    out, pooled, s1, s2 = _pool(z, stats, slope, pool_size, 2 if max_pool else 1, compute_grad)
    return (out, pooled, s1, s2) if compute_grad else (out, pooled, empty, mean.new_empty(0))


def batch_stats(z, bias, running_mean, running_var, momentum, eps):
    z, channels_last = _dense(z)
    C = z.shape[1]
    mean = torch.empty(C, dtype=torch.float32, device=z.device)
    rstd = torch.empty_like(mean)
    if z.numel() == 0:
        for tensor in (mean, rstd, running_mean, running_var):
            if tensor is not None:
                tensor.fill_(float("nan"))
        return mean, rstd
    count = z.numel() // C
    outer, inner = (1, count) if channels_last else (z.shape[0], count // z.shape[0])
    config = _config("batch_stats", (inner, C, channels_last, False), z)
    channel_blocks = _blocks(C, config["BLOCK_C"])
    splits = min(outer * _blocks(inner, config["BLOCK_P"]), 128, _blocks(1024, channel_blocks))
    partial = torch.empty((splits, 4, C), dtype=torch.float32, device=z.device)
    launch(
        triton_norm.batch_moments_kernel,
        channel_blocks * splits,
        z.device,
        z,
        partial,
        outer,
        inner,
        C,
        splits,
        CHANNELS_LAST=channels_last,
        **config,
    )
    block = min(power_of_two(C), 16)
    launch(
        triton_norm.batch_stats_kernel,
        _blocks(C, block),
        z.device,
        partial,
        bias,
        mean,
        rstd,
        running_mean,
        running_var,
        float(momentum or 0.0),
        float(eps),
        splits,
        C,
        SPLITS=power_of_two(splits),
        BLOCK_C=block,
    )
    return mean, rstd


def head(x, target, modulation, basis, options, compute_grad, reduce=True):
    """Without `reduce` the first result are the losses of the rows, for `finish` of a later call."""
    (B, d), K, C = x.shape, basis.shape[0], options.num_classes
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    losses, similarity = new(B), new(B, K)
    value = losses if options.reduction == "none" or not reduce else new()
    grad_latents, grad_logits = (new(B, d), new(B, C)) if compute_grad else (new(0), new(0))
    if B == 0:
        if value is not losses:
            value.fill_(float("nan") if options.reduction == "mean" else 0.0)
        return value, grad_latents, similarity, grad_logits
    x, basis = x.contiguous(), basis.contiguous()
    packed, precision, mean = basis.dtype == torch.int32, float32_precision(), options.reduction == "mean"
    vector, matrix = (modulation is not None and modulation.dim() == n for n in (1, 2))
    modulation = None if modulation is None else modulation.contiguous()

    grad_similarity = (new(B, K) if vector or matrix else grad_logits) if compute_grad else None
    name = _one_launch(B, d, K, C)
    if name is not None:
        kernel, through_memory = (
            (triton_head.head_kernel, ()) if name == "head" else (triton_head.wide_head_kernel, (grad_similarity,))
        )
        config = _config(name, (B, d, K, C), x)
        launch(
            kernel,
            _blocks(B, config["BLOCK_B"]),
            x.device,
            x,
            basis,
            target,
            modulation,
            losses,
            similarity,
            grad_logits,
            *through_memory,
            grad_latents,
            B,
            d,
            K,
            C,
            float(options.temperature),
            float(options.label_smoothing),
            float(options.eps),
            float(options.basis_scale),
            options.ignore_index,
            PACKED=packed,
            NORMALIZE=options.normalize,
            ZERO_BELOW=options.zero_gradient_below_eps,
            CROSS_ENTROPY=options.loss == "cross_entropy",
            MEAN=mean,
            MATRIX=matrix,
            GRAD=compute_grad,
            **config,
        )
        if value is not losses:
            _reduce_loss(losses, target, value, options.ignore_index, mean)
        return value, grad_latents, similarity, grad_logits

    config = _config("similarity", (B, d, K), x)
    programs = _blocks(B, config["BLOCK_M"]) * _blocks(K, config["BLOCK_K"])
    slices = min(_blocks(d, config["BLOCK_D"]), _blocks(256, programs), 16)
    partial, rows, count = new(slices, B, K + 1), new(2, B), new(1)
    launch(
        triton_head.similarity_kernel,
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
        logits = new(B, C)
        config = _config("logits", (B, C, K), x)
        launch(
            triton_head.logits_kernel,
            _blocks(B, config["BLOCK_M"]) * _blocks(C, config["BLOCK_N"]),
            x.device,
            partial,
            modulation,
            similarity,
            logits,
            rows,
            B,
            K,
            C,
            slices,
            float(options.eps),
            float(options.basis_scale),
            NORMALIZE=options.normalize,
            PRECISION=precision,
            **config,
        )
    config = _config("loss_rows", (B, C), x)
    launch(
        triton_head.loss_rows_kernel,
        _blocks(B, config["BLOCK_B"]),
        x.device,
        partial,
        target,
        modulation if vector else None,
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
        float(options.temperature),
        float(options.label_smoothing),
        float(options.eps),
        float(options.basis_scale),
        options.ignore_index,
        NORMALIZE=options.normalize,
        CROSS_ENTROPY=options.loss == "cross_entropy",
        MEAN=mean,
        GRAD=compute_grad,
        **config,
    )
    if matrix and compute_grad:
        config = _config("grad_similarity", (B, K, C), x)
        launch(
            triton_head.grad_similarity_kernel,
            _blocks(B, config["BLOCK_M"]) * _blocks(K, config["BLOCK_N"]),
            x.device,
            grad_logits,
            modulation,
            grad_similarity,
            B,
            K,
            C,
            PRECISION=precision,
            **config,
        )

    if compute_grad:
        config = _config("latent_grad", (B, d, K), x)
        launch(
            triton_head.latent_grad_kernel,
            _blocks(B, config["BLOCK_M"]) * _blocks(d, config["BLOCK_D"]),
            x.device,
            x,
            basis,
            grad_similarity,
            rows,
            losses,
            count,
            value,
            grad_latents,
            B,
            d,
            K,
            float(options.eps),
            float(options.basis_scale),
            PACKED=packed,
            NORMALIZE=options.normalize,
            ZERO_BELOW=options.zero_gradient_below_eps,
            REDUCE=value is not losses,
            MEAN=mean,
            PRECISION=precision,
            **config,
        )
    elif value is not losses:
        _reduce_loss(losses, target, value, options.ignore_index, mean)
    return value, grad_latents, similarity, grad_logits


def _one_launch(batch, dim, rows, classes):
    """The kernel, if any, that computes the whole head of a sample in one program."""
    if max(rows, classes) <= 32 and dim <= 4096:
        return "head"
    if max(rows, classes) <= 256 and batch * dim * rows <= _FEW_PRODUCTS:
        return "wide_head"
    return None


def _reduce_loss(losses, target, value, ignore_index, mean):
    launch(
        triton_head.reduce_loss_kernel, 1, losses.device, losses, target, value, losses.numel(), ignore_index, MEAN=mean
    )


def _finishing(finish, device):
    """`(programs, arguments, blocks)` of the kernels that finish a head, and what they return, for
    `finish` = (losses, target, similarity, dL/dlogits, modulation or None, ignore_index)."""
    blocks = dict(VECTOR=False, PRECISION="tf32x3", HEAD_B=1, HEAD_K=1, HEAD_C=1)
    if finish is None:
        return 0, (None,) * 6 + (0, 0, 0), blocks, ()
    losses, target, similarity, grad_logits, modulation, ignore_index = finish
    (B, K), C = similarity.shape, grad_logits.shape[1]
    loss, grad, programs = torch.empty((), dtype=torch.float32, device=device), None, 1
    if modulation is not None:
        vector = modulation.dim() == 1
        grad = torch.empty(modulation.shape, dtype=torch.float32, device=device)
        config = _config("finish_head", (max(B, 1), K, C), similarity)
        blocks = dict(
            VECTOR=vector,
            PRECISION=float32_precision(),
            HEAD_B=config["BLOCK_B"],
            HEAD_K=config["BLOCK_K"],
            HEAD_C=config["BLOCK_C"],
        )
        programs += _blocks(C, config["BLOCK_C"]) * (1 if vector else _blocks(K, config["BLOCK_K"]))
    results = loss, loss.new_empty(0) if grad is None else grad
    return programs, (losses, target, loss, similarity, grad_logits, grad, K, C, ignore_index), blocks, results


def modulation_grad(similarity, grad_logits, vector, scale):
    (B, K), C = similarity.shape, grad_logits.shape[1]
    grad = torch.empty((C,) if vector else (K, C), dtype=torch.float32, device=similarity.device)
    config = _config("modulation_grad", (max(B, 1), K, C), similarity)
    programs = _blocks(C, config["BLOCK_C"]) * (1 if vector else _blocks(K, config["BLOCK_K"]))
    launch(
        triton_head.modulation_grad_kernel,
        programs,
        similarity.device,
        similarity.contiguous(),
        grad_logits.contiguous(),
        scale.contiguous(),
        grad,
        B,
        K,
        C,
        PER_ROW=scale.dim() > 0,
        VECTOR=vector,
        PRECISION=float32_precision(),
        **config,
    )
    return grad


def expand_grad(grad_latents, scale, out, pool_size):
    if out.numel() == 0:
        return out
    grad_latents, scale, per_row = grad_latents.contiguous(), scale.contiguous(), scale.dim() > 0
    if out.dim() == 2:
        B, N = out.shape
        config = _config("linear_expand", (B, N), out)
        launch(
            triton_linear.linear_expand_kernel,
            _blocks(B, config["BLOCK_B"]) * _blocks(N, config["BLOCK_N"]),
            out.device,
            grad_latents,
            scale,
            out,
            B,
            N,
            pool_size,
            _cover(N, pool_size),
            PER_ROW=per_row,
            **config,
        )
        return out
    dense, channels_last = _dense(out)
    B, C, H, W = out.shape
    run, positions = _bin_layout(out.shape, pool_size, channels_last, 1)
    config = _config("expand_grad", (positions, B * C, channels_last, False), out)
    launch(
        triton_norm.expand_grad_kernel,
        pool_size**2 * _blocks(_planes(out), config["BLOCK_C"]),
        out.device,
        grad_latents,
        scale,
        dense,
        B,
        C,
        H,
        W,
        pool_size,
        PER_ROW=per_row,
        COVER=_cover2(out.shape, pool_size),
        CHANNELS_LAST=channels_last,
        RUN=run,
        **config,
    )
    return out if dense is out else out.copy_(dense)


def norm_grads(grad_latents, s1, s2, channels, area, finish=None):
    """With `finish` (see `_finishing`) also the loss and the gradient of the modulation, after the other three."""
    B, positions = grad_latents.shape[0], area.numel()
    grads = tuple(torch.empty(channels, dtype=torch.float32, device=s1.device) for _ in range(3))
    config = _config("norm_grads", (max(B, 1), channels, positions), s1)
    programs, arguments, blocks, results = _finishing(finish, s1.device)
    launch(
        triton_norm.norm_grads_kernel,
        _blocks(channels, config["BLOCK_C"]) + programs,
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
        **blocks,
        **config,
    )
    return grads + results


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    if z.numel() == 0:
        return z
    dense, channels_last = _dense(z)
    B, C, H, W = z.shape
    run, positions = _bin_layout(z.shape, pool_size, channels_last, 1)
    config = _config("grad_preactivation", (positions, B * C, channels_last, False), z)
    launch(
        triton_norm.grad_preactivation_kernel,
        pool_size**2 * _blocks(_planes(z), config["BLOCK_C"]),
        z.device,
        dense,
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
        COVER=_cover2(z.shape, pool_size),
        CHANNELS_LAST=channels_last,
        RUN=run,
        **config,
    )
    return z if dense is z else z.copy_(dense)


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale, finish=None):
    dense = z.contiguous()
    B, N = z.shape
    grads = tuple(torch.empty(N, dtype=torch.float32, device=z.device) for _ in range(3))
    config = _config("linear_grad", (max(B, 1), N), z)
    programs, arguments, blocks, results = _finishing(finish, z.device)
    launch(
        triton_linear.linear_grad_kernel,
        _blocks(N, config["BLOCK_N"]) + programs,
        z.device,
        dense,
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
        _cover(N, pool_size),
        *arguments,
        **blocks,
        **config,
    )
    if dense is not z:
        z.copy_(dense)
    return grads + results
