"""Block sizes of the kernels of nets that settle, by sizes, dtype and architecture (core/tiles.py).

The tables were chosen by registers and by how many programs a batch of 50 and one of 1024 make, and have not been
timed on a GPU yet.
"""

WIDEST = 64  # units of the last layer, and classes, of which a tile has all: those of larger ones are torch's


def _step(sizes, dtype, arch):
    """Tile (rows, units), and the depth of a product. last: units of the last layer where it is nudged, else 0; pairs:
    of complex rows, and of tangents. Few rows: as many programs as can be. In a net of 784-256-256-10 that is 68 of
    them at 50 rows, 288 at 1024."""
    rows, last, pairs = sizes
    if arch == "interpret":
        return {"BLOCK_M": max(min(rows, 128), 16), "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 1}
    block_m, block_n = (16, 32) if rows <= 256 else (16 if pairs else 32, 64)
    return {"BLOCK_M": block_m, "BLOCK_N": 64 if last > 32 else block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


def _stream(sizes, dtype, arch):
    """Elements, or windows, of a program."""
    if arch == "interpret":
        return {"BLOCK": min(max(sizes[0], 16), 1 << 14), "num_warps": 1}
    return {"BLOCK": 512, "num_warps": 4}


def _error(sizes, dtype, arch):
    """Elements of a program that adds complex activities up: of 512, Triton 3.6 spills dsilu's registers on sm_120."""
    return _stream(sizes, dtype, arch) if arch == "interpret" else {"BLOCK": 256, "num_warps": 4}


def _skew(sizes, dtype, arch):
    """A tile of a matrix and of another's transpose."""
    rows, columns = sizes
    if arch == "interpret":
        return {"BLOCK_R": min(rows, 128), "BLOCK_C": min(columns, 128), "num_warps": 1}
    return {"BLOCK_R": 32, "BLOCK_C": 32, "num_warps": 4}


TILES = {"step": _step, "stream": _stream, "error": _error, "skew": _skew}
