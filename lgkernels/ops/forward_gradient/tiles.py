"""Block sizes of the kernels of forward gradients, by sizes, dtype and architecture (core/tiles.py)."""

from ...core.tiles import ELEMENTS

# Channels of a tile that holds whole rows, at most. The interpreter has fewer, so that small cases reach all paths.
_MOST, _WHOLE = 4096, {"interpret": 1024}
_PER_THREAD = 8  # values of a thread: a row has several tensors, and noise by formula needs registers of its own


def _stream(sizes, dtype, arch, most=ELEMENTS):
    """Tile (patches, groups, channels): 128 places of each patch, more of them where there are few patches."""
    patches, groups, channels = sizes
    elements = 1 << 14 if arch == "interpret" else most
    block_c = min(channels, _WHOLE.get(arch, _MOST))
    block_g = min(groups, max(128 // block_c, 1))
    block_p = min(patches, max(elements // (block_g * block_c), 1))
    block_g = min(groups, max(elements // (block_p * block_c), 1))
    tile = {"BLOCK_P": block_p, "BLOCK_G": block_g, "BLOCK_C": block_c}
    return tile | _threads(block_p * block_g * block_c, arch)


def _threads(elements, arch):
    """Without a limit of its own the assembler aims at a round number of programs, and keeps eight bytes of some
    variants on the stack for it."""
    if arch == "interpret":
        return {"num_warps": 1}
    return {"num_warps": min(max(elements // (32 * _PER_THREAD), 1), 16), "maxnreg": 136}


def _pool(sizes, dtype, arch):
    """Half as many where a norm is in front: with eight warps the assembler keeps eight bytes of odd rows on the stack
    on sm_90."""
    return _stream(sizes, dtype, arch, ELEMENTS // 2)


def _norm(sizes, dtype, arch):
    """Tile (rows, channels). Rows that lie side by side: a line of 128 bytes of them, 64 channels at a time unless all
    of them fit."""
    rows, channels, last = sizes
    elements = 1 << 14 if arch == "interpret" else ELEMENTS
    if last:
        most = _WHOLE.get(arch, _MOST)
        block_c = channels if channels <= most else most // 2
        block_r = min(rows, max(elements // block_c, 1))
    else:
        block_r = min(rows, 256 if arch == "interpret" else 128 // dtype.itemsize)
        block_c = min(channels, 64 if arch == "interpret" else elements // block_r)
    tile = {"WHOLE": channels <= block_c, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return tile | _threads(block_r * block_c, arch)


def _rows(sizes, dtype, arch):
    """Whole rows a program, a tile of columns at a time."""
    rows, columns = sizes
    if arch == "interpret":
        return {"BLOCK_B": min(rows, 128), "BLOCK_F": min(columns, 4096), "num_warps": 1}
    block_f = min(columns, 1024)
    block_b = min(rows, max(128 // block_f, 1))
    return {"BLOCK_B": block_b, "BLOCK_F": block_f, "num_warps": max(block_b * block_f // 256, 1)}


TILES = {"stream": _stream, "pool": _pool, "norm": _norm, "rows": _rows}
