"""Block sizes of the Triton kernels: `select_config(op, sizes, dtype, arch)`, a pure function over shipped tables.

Sizes are rounded up to powers of two first, so that a changing batch or feature map does not compile a kernel anew.
Candidates that need more shared memory than the architecture has are dropped, the first that remains wins; there is no
tuning at run time. Under TRITON_INTERPRET=1 the architecture is "interpret": a program costs about a millisecond there,
whatever its size, so blocks are as large as the data.
"""

from functools import lru_cache

import torch

# Shared memory that one block may use, bytes.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# Elementwise passes: elements of a tile. With sixteen elements a thread enough loads are in flight, and three float32
# accumulators of that size still fit the registers.
_TILES = dict.fromkeys(SHARED_MEMORY, 2048)

# Matrix products: (three block sizes, warps, stages), largest first. M samples, K basis rows, D latents, N columns.
_SIMILARITY = ((16, 64, 32, 4, 3), (16, 32, 32, 4, 3), (16, 16, 64, 4, 3))
_LATENT_GRAD = ((16, 32, 64, 4, 3), (16, 16, 64, 4, 3))
_PRODUCT = ((16, 64, 32, 4, 3), (16, 16, 16, 4, 3))
_MODULATION_GRAD = ((32, 64, 64, 4, 3), (32, 32, 32, 4, 3), (32, 16, 16, 4, 3))

# Feedback: M rows of the gradient, N rows and K columns of F. One tile holds all M up to 128 (64 in float32, whose
# three products take more registers), so each weight is read and made once. The tables were chosen by registers and
# shared memory, and have not been timed on a GPU yet.
_FEEDBACK_PRODUCT = ((128, 32, 128, 8, 3), (64, 32, 128, 8, 3), (32, 32, 128, 8, 4), (16, 32, 128, 4, 4))
_FEEDBACK_UPDATE = ((32, 64, 128, 8, 3), (16, 32, 128, 4, 3))


def power_of_two(n):
    """Smallest power of two >= n (1 for n = 0)."""
    return 1 << max(int(n) - 1, 0).bit_length()


@lru_cache(maxsize=16)
def architecture(device):
    """The table that serves `device`: the newest architecture that is not newer than it, or "interpret"."""
    if device.type != "cuda":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(device)
    older = [arch for arch in SHARED_MEMORY if arch <= 10 * major + minor]
    return max(older, default=80)


def _fits(m, k, d, stages, arch):
    return 4 * (m * k + k * d + m * d) * stages <= SHARED_MEMORY[arch]


def _first(candidates, arch, wanted):
    return next(c for c in candidates if wanted(*c[:3]) and _fits(*c[:3], c[4], arch))


def _tile(sizes, dtype, arch):
    """Tile (positions, planes) with at least 256 bytes along the contiguous axis where the tensor has them."""
    positions, planes, channels_last, pooled = sizes
    if arch == "interpret":
        block_p = min(positions, 1 << 12)
        return {"BLOCK_P": block_p, "BLOCK_C": min(planes, (1 << 14) // block_p), "num_warps": 1}
    per_thread = 4 if pooled else 16  # pooled: a group of four positions is live at once
    elements = _TILES[arch] * per_thread // 16
    run = 256 // dtype.itemsize
    if channels_last:
        block_c = min(planes, run)
        block_p = min(positions, elements // block_c)
    else:
        block_p = min(positions, run)
        block_c = min(planes, elements // block_p, 256)
    # Unaligned small tiles need more registers. On sm_80 the assembler keeps 8 bytes of a pooled NCHW tile on the stack
    # with four values a thread, none with eight.
    a_thread = 8 if arch == 80 and pooled and not channels_last else min(per_thread, 8)
    warps = max(min(block_p * block_c // (32 * a_thread), 4), 1)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": warps}


def _moments(sizes, dtype, arch):
    """As `_tile`, with eight values a thread: each has a mean and a sum of squares of its own."""
    config = _tile(sizes, dtype, arch)
    if arch != "interpret":
        config["num_warps"] = max(min(config["BLOCK_P"] * config["BLOCK_C"] // 256, 8), 1)
    return config


def _rows(sizes, dtype, arch):
    """Tile (batch rows, columns) of a two-dimensional pass, columns contiguous."""
    rows, columns = sizes
    if arch == "interpret":
        return {"BLOCK_B": min(rows, 128), "BLOCK_N": min(columns, 1024), "num_warps": 1}
    return {"BLOCK_B": min(rows, 16), "BLOCK_N": min(columns, 32), "num_warps": 4}


def _similarity(sizes, dtype, arch):
    batch, dim, rows = sizes
    if arch == "interpret":
        m, k, d, warps, stages = min(batch, 128), min(rows, 256), max(min(dim, 512), 32), 1, 1
    else:
        m, k, d, warps, stages = _first(_SIMILARITY, arch, lambda m, k, d: k <= rows or k == 16)
    return {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def _head(sizes, dtype, arch):
    """A sample a program, with a tile (basis rows, latents) of at most 2048 products in registers."""
    batch, dim, rows, classes = sizes
    if arch == "interpret":
        batch = min(batch, 64)
        return {
            "BLOCK_B": batch,
            "BLOCK_K": rows,
            "BLOCK_C": classes,
            "BLOCK_D": max(min(dim, (1 << 18) // (batch * rows)), 32),
            "num_warps": 1,
        }
    block_d = max(min(dim, 2048 // rows, 128), 32)
    return {"BLOCK_B": 1, "BLOCK_K": rows, "BLOCK_C": classes, "BLOCK_D": block_d, "num_warps": 4}


def _wide_head(sizes, dtype, arch):
    """As `_head`, in tiles of basis rows."""
    batch, dim, rows, classes = sizes
    if arch == "interpret":
        rows = min(rows, 64)
        return _head((batch, dim, rows, classes), dtype, arch)
    # Eight warps spill a little on sm_80, four elsewhere.
    warps = 4 if classes <= 128 or arch == 80 else 8
    return {"BLOCK_B": 1, "BLOCK_K": 16, "BLOCK_C": classes, "BLOCK_D": 128, "num_warps": warps}


def _loss_rows(sizes, dtype, arch):
    """A row of classes lives in registers."""
    batch, classes = sizes
    if arch == "interpret":
        return {"BLOCK_B": min(batch, 128), "BLOCK_C": classes, "num_warps": 1}
    return {"BLOCK_B": 1, "BLOCK_C": classes, "num_warps": 1 if classes <= 256 else 4}


def _product(sizes, dtype, arch):
    """(batch, columns) = (batch, inner) times a modulation matrix."""
    batch, columns, inner = sizes
    if arch == "interpret":
        m, n, k, warps, stages = min(batch, 128), min(columns, 256), min(inner, 256), 1, 1
    else:
        m, n, k, warps, stages = _first(_PRODUCT, arch, lambda m, n, k: n <= columns or n == 16)
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _latent_grad(sizes, dtype, arch):
    batch, dim, rows = sizes
    if arch == "interpret":
        m, k, d, warps, stages = min(batch, 128), min(rows, 256), max(min(dim, 512), 32), 1, 1
    else:
        m, k, d, warps, stages = _first(_LATENT_GRAD, arch, lambda m, k, d: k <= rows or k == 16)
    return {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def _modulation_grad(sizes, dtype, arch):
    batch, rows, classes = sizes
    if arch == "interpret":
        return {
            "BLOCK_B": min(batch, 128),
            "BLOCK_K": min(rows, 256),
            "BLOCK_C": min(classes, 256),
            "num_warps": 1,
            "num_stages": 1,
        }
    b, k, c, warps, stages = _first(_MODULATION_GRAD, arch, lambda b, k, c: (k <= rows and c <= classes) or k == 16)
    return {"BLOCK_B": b, "BLOCK_K": k, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}


def _finish_head(sizes, dtype, arch):
    """The modulation's gradient inside another kernel: small tiles, which leave that kernel its registers."""
    smallest = _MODULATION_GRAD[-1][:3]
    return (
        _modulation_grad(sizes, dtype, arch)
        if arch == "interpret"
        else dict(zip(("BLOCK_B", "BLOCK_K", "BLOCK_C"), smallest))
    )


def _norm_grads(sizes, dtype, arch):
    batch, channels, positions = sizes
    block_p = min(positions, 64)
    block_b, block_c, warps = (min(batch, 128), channels, 1) if arch == "interpret" else (32, min(channels, 4), 4)
    return {"BLOCK_B": block_b, "BLOCK_C": min(block_c, 16384 // block_p), "BLOCK_P": block_p, "num_warps": warps}


def _feedback_matrix(sizes, dtype, arch):
    """Tile (rows, columns) of a pass that writes F; a Philox call makes v columns of a row."""
    rows, columns, v = sizes
    if arch == "interpret":
        return {"BLOCK_N": min(rows, 128), "BLOCK_K": max(min(columns, 1024), 32, v), "num_warps": 1}
    block_k = max(min(columns, 256), 128)
    return {"BLOCK_N": 2048 // block_k, "BLOCK_K": block_k, "num_warps": 4}


def _feedback_product(sizes, dtype, arch):
    """grad (M, N) times F (N, K), made v columns of a row at a time (at least a word of packed signs)."""
    m, n, k, v = sizes
    if arch == "interpret":
        return {"BLOCK_M": min(m, 128), "BLOCK_N": min(n, 128), "BLOCK_K": max(min(k, 512), 32, v), "num_warps": 1}
    wanted = min(max(m, 16), 64 if dtype == torch.float32 else 128)
    block_m, block_n, block_k, warps, stages = next(row for row in _FEEDBACK_PRODUCT if row[0] <= wanted)
    if v > 1 and block_m <= 32:
        block_n = 16  # random values pass through shared memory: smaller tiles leave room for more programs
    # Without a limit of its own the assembler aims at a round number of programs and spills eight bytes to meet it.
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": max(min(n, block_n), 16),
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": 168 if block_m <= 32 else 255,
    }


def _feedback_update(sizes, dtype, arch):
    """The tile of W (N, K) that a program updates; its sum runs over M."""
    m, n, k = sizes
    if arch == "interpret":
        return {"BLOCK_M": min(m, 128), "BLOCK_N": min(n, 128), "BLOCK_K": min(k, 512), "num_warps": 1}
    m, n, k, warps, stages = next(row for row in _FEEDBACK_UPDATE if row[0] <= max(m, 16))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def _feedback_sum(sizes, dtype, arch):
    return {"BLOCK": min(sizes[0], 1 << 16) if arch == "interpret" else 512, "num_warps": 4}


def _local_map(sizes, dtype, arch, per_thread=16):
    """Tile (positions, planes) of a pass over a feature map; with the channels last 128 bytes of them a position, which
    leaves programs enough for a sample's channels."""
    positions, planes, channels_last = sizes
    if arch == "interpret":
        block_p = min(positions, 1 << 12)
        return {"BLOCK_P": block_p, "BLOCK_C": min(planes, (1 << 14) // block_p), "num_warps": 1}
    if channels_last:
        block_c = min(planes, 128 // dtype.itemsize)
        block_p = min(positions, _TILES[arch] // block_c)
    else:
        block_p = min(positions, 512)
        block_c = min(planes, _TILES[arch] // block_p)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(block_p * block_c // (32 * per_thread), 1)}


def _local_reduction(sizes, dtype, arch):
    """Eight values a thread: each may have a mean and a sum of squares of its own, and with sixteen sums the assembler
    of Triton 3.6 keeps eight bytes on the stack on sm_120."""
    return _local_map(sizes, dtype, arch, per_thread=8)


def _local_rows(sizes, dtype, arch):
    """Whole rows a program, a tile of columns at a time."""
    rows, columns = sizes
    if arch == "interpret":
        return {"BLOCK_B": min(rows, 128), "BLOCK_F": min(columns, 4096), "num_warps": 1}
    block_f = min(columns, 1024)
    return {"BLOCK_B": 1, "BLOCK_F": block_f, "num_warps": max(block_f // 256, 1)}


def _offset_sgd(sizes, dtype, arch):
    """PARTS blocks of BLOCK elements a program: five streams of 16-byte loads."""
    if arch == "interpret":
        return {"BLOCK": min(sizes[0], 1 << 13), "PARTS": 1, "num_warps": 1}
    return {"BLOCK": 2048, "PARTS": 4, "num_warps": 8}


_SELECT = {
    "norm_act_pool": _tile,
    "grad_preactivation": _tile,
    "expand_grad": _tile,
    "batch_stats": _moments,
    "linear_pool": _rows,
    "linear_expand": _rows,
    "linear_grad": _rows,
    "head": _head,
    "wide_head": _wide_head,
    "similarity": _similarity,
    "logits": _product,
    "loss_rows": _loss_rows,
    "grad_similarity": _product,
    "feedback_matrix": _feedback_matrix,
    "feedback_product": _feedback_product,
    "feedback_sum": _feedback_sum,
    "feedback_update": _feedback_update,
    "latent_grad": _latent_grad,
    "modulation_grad": _modulation_grad,
    "norm_grads": _norm_grads,
    "finish_head": _finish_head,
    "local_sums": _local_reduction,
    "local_scale": _local_map,
    "local_deviation": _local_reduction,
    "local_rows": _local_rows,
    "offset_sgd": _offset_sgd,
}


@lru_cache(maxsize=4096)
def _select(op, bucket, dtype, arch):
    return _SELECT[op](bucket, dtype, arch)


def select_config(op, sizes, dtype, arch):
    """Block sizes, warps and stages of kernel `op` for `sizes` (ints, rounded up to powers of two, or bools)."""
    bucket = tuple(n if isinstance(n, bool) else power_of_two(n) for n in sizes)
    return _select(op, bucket, dtype, arch)
