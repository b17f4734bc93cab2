"""Block sizes of the kernels of the local losses, by sizes, dtype and architecture (core/tiles.py)."""

from ...core.tiles import ELEMENTS


def _map(sizes, dtype, arch, per_thread=16):
    """Tile (positions, planes) of a pass over a feature map; with the channels last 128 bytes of them a position, which
    leaves programs enough for a sample's channels."""
    positions, planes, channels_last = sizes
    if arch == "interpret":
        block_p = min(positions, 1 << 12)
        return {"BLOCK_P": block_p, "BLOCK_C": min(planes, (1 << 14) // block_p), "num_warps": 1}
    if channels_last:
        block_c = min(planes, 128 // dtype.itemsize)
        block_p = min(positions, ELEMENTS // block_c)
    else:
        block_p = min(positions, 512)
        block_c = min(planes, ELEMENTS // block_p)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(block_p * block_c // (32 * per_thread), 1)}


def _reduction(sizes, dtype, arch):
    """Eight values a thread: each may have a mean and a sum of squares of its own, and with sixteen sums the assembler
    of Triton 3.6 keeps eight bytes on the stack on sm_120. They are one load of 16 bytes in half precision, so four
    tiles are loaded at a time where a plane has them."""
    config = _map(sizes, dtype, arch, per_thread=8)
    if arch == "interpret":  # in four tiles too, so that the tests run the same code
        config["BLOCK_P"] = max(config["BLOCK_P"] // 4, 1)
    else:
        # Without a limit of its own the assembler aims at a round number of programs, for which it issues loads later
        # or spills.
        config["maxnreg"] = 128
    return config | {"LOADS": 4 if sizes[0] >= 4 * config["BLOCK_P"] else 1}


def _rows(sizes, dtype, arch):
    """Whole rows a program, a tile of columns at a time."""
    rows, columns = sizes
    if arch == "interpret":
        return {"BLOCK_B": min(rows, 128), "BLOCK_F": min(columns, 4096), "num_warps": 1}
    block_f = min(columns, 1024)
    return {"BLOCK_B": 1, "BLOCK_F": block_f, "num_warps": max(block_f // 256, 1)}


TILES = {"sums": _reduction, "scale": _map, "deviation": _reduction, "rows": _rows}
