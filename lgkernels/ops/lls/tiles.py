"""Block sizes of the LLS kernels, by sizes, dtype and architecture (core/tiles.py)."""

from functools import partial

from ...core.tiles import ELEMENTS, first_fit

# Matrix products: (three block sizes, warps, stages), largest first. M samples, K basis rows, D latents, N columns.
SIMILARITY = ((16, 64, 32, 4, 3), (16, 32, 32, 4, 3), (16, 16, 64, 4, 3))
LATENT_GRAD = ((16, 32, 64, 4, 3), (16, 16, 64, 4, 3))
PRODUCT = ((16, 64, 32, 4, 3), (16, 16, 16, 4, 3))
MODULATION_GRAD = ((32, 64, 64, 4, 3), (32, 32, 32, 4, 3), (32, 16, 16, 4, 3))

# Samples times latents times basis rows up to which a head of 33 to 256 classes is one launch, which saves two (four
# with a matrix). It multiplies with plain arithmetic, 13 instructions of sm_86 a product on the way to s and 24 on the
# way back; three launches multiply on the tensor cores with 1.7. Chosen by counting (so many products are 1.2 million
# instructions of warps, some ten microseconds of a small card), not measured on a GPU yet.
FEW_PRODUCTS = 1 << 20


def _tile(sizes, dtype, arch):
    """Tile (positions, planes) with at least 256 bytes along the contiguous axis where the tensor has them."""
    positions, planes, channels_last, pooled = sizes
    if arch == "interpret":
        block_p = min(positions, 1 << 12)
        return {"BLOCK_P": block_p, "BLOCK_C": min(planes, (1 << 14) // block_p), "num_warps": 1}
    per_thread = 4 if pooled else 16  # pooled: a group of four positions is live at once
    elements = ELEMENTS * per_thread // 16
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


def _basis_product(sizes, dtype, arch, table):
    """(samples, latents) times the basis (basis rows, latents), or its adjoint."""
    batch, dim, rows = sizes
    if arch == "interpret":
        m, k, d, warps, stages = min(batch, 128), min(rows, 256), max(min(dim, 512), 32), 1, 1
    else:
        m, k, d, warps, stages = first_fit(table, arch, lambda m, k, d: k <= rows or k == 16)
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
    # Eight warps spill a little on sm_75 and sm_80, four elsewhere.
    warps = 4 if classes <= 128 or arch <= 80 else 8
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
        m, n, k, warps, stages = first_fit(PRODUCT, arch, lambda m, n, k: n <= columns or n == 16)
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


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
    b, k, c, warps, stages = first_fit(MODULATION_GRAD, arch, lambda b, k, c: (k <= rows and c <= classes) or k == 16)
    return {"BLOCK_B": b, "BLOCK_K": k, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}


def _finish_head(sizes, dtype, arch):
    """The modulation's gradient inside another kernel: small tiles, which leave that kernel its registers."""
    smallest = MODULATION_GRAD[-1][:3]
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


TILES = {
    "norm_act_pool": _tile,
    "grad_preactivation": _tile,
    "expand_grad": _tile,
    "batch_stats": _moments,
    "linear_pool": _rows,
    "linear_expand": _rows,
    "linear_grad": _rows,
    "head": _head,
    "wide_head": _wide_head,
    "similarity": partial(_basis_product, table=SIMILARITY),
    "logits": _product,
    "loss_rows": _loss_rows,
    "grad_similarity": _product,
    "latent_grad": partial(_basis_product, table=LATENT_GRAD),
    "modulation_grad": _modulation_grad,
    "norm_grads": _norm_grads,
    "finish_head": _finish_head,
}
