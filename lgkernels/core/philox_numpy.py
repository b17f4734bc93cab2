"""Rows of a random matrix (lgkernels/random.py) on the CPU, in NumPy.

torch has no unsigned 64-bit arithmetic, so its version takes over a thousand operations. This one works in place, in
blocks that stay in the cache. Words, uniform, uniform8 and sign have the same bits, normal within 4 ulp.
"""

import numpy as np

_COUNTERS_AT_ONCE = 1 << 12  # six arrays of 32 KB
_MASK = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_f32 = np.float32


def philox(counter: list[np.ndarray], key: tuple[int, int], scratch: list[np.ndarray]) -> None:
    """Ten rounds of Philox4x32 in place: the four 32-bit words of each counter, as uint64. `scratch`: two arrays."""
    c0, c1, c2, c3 = counter
    p0, p1 = scratch
    low, high = key
    for _ in range(10):
        np.multiply(c0, _FACTORS[0], out=p0)
        np.multiply(c2, _FACTORS[1], out=p1)
        np.right_shift(p1, _HIGH, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(low), out=c0)
        np.right_shift(p0, _HIGH, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(high), out=c2)
        np.bitwise_and(p1, _MASK, out=c1)
        np.bitwise_and(p0, _MASK, out=c3)
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF


def _unit(words: np.ndarray) -> np.ndarray:
    """((word >> 9) + 0.5) * 2**-23, exact. Overwrites the words."""
    words >>= np.uint32(9)
    unit = words.astype(_f32)
    unit += _f32(0.5)
    unit *= _f32(2.0**-23)
    return unit


def _affine(unit: np.ndarray, scale: float, low: float) -> np.ndarray:
    """low + (scale - low) * unit, rounded once."""
    span, low = _f32(scale - low), _f32(low)
    if low == 0:  # then the float32 product is that already
        return np.multiply(unit, span, out=unit)
    wide = unit.astype(np.float64)
    wide *= np.float64(span)
    wide += np.float64(low)
    return wide.astype(_f32)


def _normal(words: np.ndarray, scale: float) -> np.ndarray:
    """Box-Muller in float64 of the float32 angle."""
    unit = _unit(words)
    radius = np.sqrt(-2 * np.log(unit[:, 0::2].astype(np.float64)))
    angle = (unit[:, 1::2] * _f32(2 * np.pi)).astype(np.float64)
    np.multiply(radius, np.cos(angle), out=unit[:, 0::2], casting="same_kind")
    np.multiply(radius, np.sin(angle), out=unit[:, 1::2], casting="same_kind")
    unit *= _f32(scale)
    return unit


def _table(law: str, scale: float, low: float | None) -> np.ndarray:
    """The values that a byte of a word stands for: (256, 1) of uniform8, (256, 8) of sign."""
    byte = np.arange(256)[:, None]
    if law == "sign":
        return np.where((byte >> np.arange(8)) & 1, -_f32(scale), _f32(scale))
    byte = byte.astype(_f32)
    return ((2 * byte - 255) / 256) * _f32(scale) if low is None else _affine((byte + _f32(0.5)) / 256, scale, low)


def _values(words: np.ndarray, law: str, scale: float, low: float | None, table: np.ndarray | None) -> np.ndarray:
    """(n, 4) uint32 -> (n, values of one Philox call) float32. Overwrites the words."""
    if table is not None:
        return np.take(table, words.view(np.uint8), axis=0).reshape(len(words), -1)
    if law == "normal":
        return _normal(words, scale)
    unit = _unit(words)
    if low is not None:
        return _affine(unit, scale, low)
    unit *= _f32(2)
    unit -= _f32(1)
    unit *= _f32(scale)
    return unit


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to nearest even. Overwrites the values."""
    bits = values.view(np.uint32)
    bits += ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return bits >> np.uint32(16)


@np.errstate(over="ignore", under="ignore")  # near the ends of a dtype: inf and 0, as in torch
def rows(
    state: np.ndarray,
    index: np.ndarray,
    columns: tuple[int, int],
    law: str,
    values_per_call: int,
    scale: float,
    low: float | None,
    dtype: str = "float32",
) -> np.ndarray:
    """(len(index), stop - start) in `dtype`: rows `index` and `columns` (start, stop) of the matrix of `state` (seed,
    stream, step). "bfloat16" comes as its bits, in uint16."""
    seed, stream, step = (int(word) % 2**64 for word in state)
    start, stop = columns
    first, blocks = start // values_per_call, -(-stop // values_per_call) - start // values_per_call
    out = np.empty((len(index), stop - start), "uint16" if dtype == "bfloat16" else dtype)
    if not out.size:
        return out
    table = _table(law, scale, low) if law in ("uniform8", "sign") else None
    across = min(blocks, _COUNTERS_AT_ONCE)
    down = min(max(1, _COUNTERS_AT_ONCE // across), len(index))
    memory = np.empty((6, down * across), np.uint64)
    words = np.empty((down * across, 4), "<u4")
    for row in range(0, len(index), down):
        some = index[row : row + down].astype(np.uint64)[:, None] & _MASK
        for block in range(first, first + blocks, across):
            width = min(across, first + blocks - block)
            size = len(some) * width
            arrays = [part[:size] for part in memory]
            shaped = [part.reshape(len(some), width) for part in arrays[:4]]
            shaped[0][:] = np.arange(block, block + width, dtype=np.uint64)
            shaped[1][:] = some
            shaped[2][:] = np.uint64(step & 0xFFFFFFFF)
            shaped[3][:] = np.uint64(stream & 0xFFFFFFFF)
            philox(arrays[:4], (seed & 0xFFFFFFFF, seed >> 32), arrays[4:])
            for place in range(4):
                words[:size, place] = arrays[place]
            made = _values(words[:size], law, scale, low, table).reshape(len(some), -1)
            made = _bfloat16(made) if dtype == "bfloat16" else made
            column = block * values_per_call
            left, right = max(column, start), min(column + made.shape[1], stop)
            out[row : row + len(some), left - start : right - start] = made[:, left - column : right - column]
    return out
