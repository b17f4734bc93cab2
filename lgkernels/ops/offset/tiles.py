"""Block sizes of the offset step (core/tiles.py)."""


def _offset_sgd(sizes, dtype, arch):
    """PARTS blocks of BLOCK elements a program: five streams of 16-byte loads."""
    if arch == "interpret":
        return {"BLOCK": min(sizes[0], 1 << 13), "PARTS": 1, "num_warps": 1}
    return {"BLOCK": 2048, "PARTS": 4, "num_warps": 8}


TILES = {"offset_sgd": _offset_sgd}
