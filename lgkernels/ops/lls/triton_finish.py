"""What is left of a head after all its samples, in Triton: the loss of them all, and the gradient of the modulation.

    loss = sum of losses, or their mean over the targets that are not ignored
    dL/dm = sum over the batch of scale * dL/dlogits * s        modulation m (C,)
    dL/dM = s^T (scale * dL/dlogits)                            modulation M (K, C)

In a fused block the programs of `finish_head` ride along with the launch of the norm's gradients.
"""

import triton
import triton.language as tl

from ..common.addressing import indices, load_tile, offset, program_id, store_tile
from ..common.dot import dot, float32_precision
from ..common.launch import block_count, configuration, launch, new
from .tiles import TILES
from .triton_steps import store_loss, valid_rows


@triton.jit(do_not_specialize=["B", "ignore_index"])
def reduce_loss_kernel(losses, target, loss, B, ignore_index, MEAN: tl.constexpr):
    """loss = sum of losses, divided by the number of rows that count with MEAN. One program."""
    count = 1.0
    if MEAN:
        count = valid_rows(target, B, ignore_index)
    store_loss(losses, count, loss, B)


def reduce_loss(losses, target, loss, options):
    mean = options.reduction == "mean"
    launch(reduce_loss_kernel, 1, losses.device, losses, target, loss, losses.numel(), options.ignore_index, MEAN=mean)


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
    """Tile number `tile` of the modulation's gradient, over the whole batch; without `scale` it is 1."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    k, c = indices(tile // c_blocks, BLOCK_K), indices(tile % c_blocks, BLOCK_C)
    by_vector = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    by_matrix = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        g = load_tile(grad_logits, b, c, B, C)
        if scale is not None:
            if PER_ROW:
                g = g * tl.load(scale + b, mask=b < B, other=0.0).to(tl.float32)[:, None]
            else:
                g = g * tl.load(scale).to(tl.float32)
        if VECTOR:
            by_vector += g * load_tile(similarity, b, c, B, C)
        else:
            s = tl.load(
                similarity + offset(b, K)[None, :] + k[:, None], mask=(b < B)[None, :] & (k < K)[:, None], other=0.0
            )
            by_matrix = dot(s, g, by_matrix, PRECISION)
    if VECTOR:
        tl.store(grad + c, tl.sum(by_vector, 0), mask=c < C)
    else:
        store_tile(grad, by_matrix, k, c, K, C)


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
    tile = program_id(0)
    _modulation_tile(
        tile, similarity, grad_logits, scale, grad, B, K, C, PER_ROW, VECTOR, PRECISION, BLOCK_B, BLOCK_K, BLOCK_C
    )


def _tiles_of_modulation(K, C, vector, config):
    return block_count(C, config["BLOCK_C"]) * (1 if vector else block_count(K, config["BLOCK_K"]))


def modulation_grad(similarity, grad_logits, vector, scale):
    (B, K), C = similarity.shape, grad_logits.shape[1]
    grad = new(similarity, C) if vector else new(similarity, K, C)
    config = configuration(TILES["modulation_grad"], (max(B, 1), K, C), similarity)
    launch(
        modulation_grad_kernel,
        _tiles_of_modulation(K, C, vector, config),
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
        store_loss(losses, valid_rows(target, B, ignore_index), loss, B)
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


def finishing(finish, like):
    """`(programs, arguments, blocks)` of the kernels that finish a head, and what they return, for
    `finish` = (losses, target, similarity, dL/dlogits, modulation or None, ignore_index)."""
    meta = dict(VECTOR=False, PRECISION="tf32x3", HEAD_B=1, HEAD_K=1, HEAD_C=1)
    if finish is None:
        return 0, (None,) * 6 + (0, 0, 0), meta, ()
    losses, target, similarity, grad_logits, modulation, ignore_index = finish
    (B, K), C = similarity.shape, grad_logits.shape[1]
    loss, grad, programs = new(like), None, 1
    if modulation is not None:
        vector = modulation.dim() == 1
        grad = new(like, *modulation.shape)
        config = configuration(TILES["finish_head"], (max(B, 1), K, C), similarity)
        meta = dict(VECTOR=vector, PRECISION=float32_precision())
        meta |= {f"HEAD_{axis}": config[f"BLOCK_{axis}"] for axis in "BKC"}
        programs += _tiles_of_modulation(K, C, vector, config)
    results = loss, new(like, 0) if grad is None else grad
    return programs, (losses, target, loss, similarity, grad_logits, grad, K, C, ignore_index), meta, results
