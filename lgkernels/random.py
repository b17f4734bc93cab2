"""Random matrices that are formulas, not tensors: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011).

Element (row, col) of a matrix comes from one Philox call with

    counter = (col // v, row, step, stream)    key = (seed low 32 bits, seed high 32 bits)

which yields v values in word-then-byte-then-bit order, low first. With u(word) = ((word >> 9) + 0.5) * 2**-23:

    law        v     value
    uniform    4     scale * (2u - 1), or low + (scale - low) * u
    normal     4     scale * (r cos t, r sin t), r = sqrt(-2 ln u(w0)), t = fl32(2 pi u(w1)); then words 2 and 3
    uniform8   16    scale * (2 byte - 255) / 256, or low + (scale - low) * (byte + 0.5) / 256
    sign       128   -scale where the bit is set, else scale

A value depends on (seed, stream, step, row, col) alone: not on the matrix's shape, tile, device or sharding, so a
slice of a matrix is the matrix of the slice. Arithmetic is float32, each operation rounded once, but for the forms
with `low`: a fused multiply-add of the float32 numbers scale - low and low, rounded once in all. Words, uniform,
uniform8 and sign are bit-equal in every backend (`csrc/common/philox.h`, `ops/common/philox.py`) and in the faster
ways that are taken here (`core/philox_numpy.py`, `core/philox_cuda.py`, the C++ kernels), normal within 4 ulp of the
value computed here. `LAW_VERSION` changes with any of this.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .core import checks, float64, native, philox_cuda, philox_numpy
from .core.carried import Carried, own_write, verified
from .core.random_checks import check_dtype, check_state

__all__ = [
    "LAW_VERSION",
    "VALUES_PER_CALL",
    "Law",
    "RandomFeedback",
    "law_values",
    "philox",
    "random_matrix",
    "random_rows",
]

LAW_VERSION = 2
Law = Literal["uniform", "normal", "uniform8", "sign"]
VALUES_PER_CALL = {"uniform": 4, "normal": 4, "uniform8": 16, "sign": 128}

_MASK = 0xFFFFFFFF
_OF_NUMPY = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCKS_AT_ONCE = 1 << 18  # counters computed together: bounds the integer temporaries to a few MB


def philox(
    c0: Tensor | int,
    c1: Tensor | int,
    c2: Tensor | int,
    c3: Tensor | int,
    key_low: Tensor | int,
    key_high: Tensor | int,
) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32: six broadcastable int64 tensors (or ints) of 32-bit words in, four words out."""
    for _ in range(10):
        # x * M as x * (M - 2**32) + x * 2**32: no product leaves the signed 64-bit range
        p0, p1 = c0 * (0xD2511F53 - 2**32), c2 * (0xCD9E8D57 - 2**32)
        high0, high1 = ((p0 >> 32) + c0) & _MASK, ((p1 >> 32) + c2) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ key_low, p1 & _MASK, high0 ^ c3 ^ key_high, p0 & _MASK
        key_low, key_high = (key_low + 0x9E3779B9) & _MASK, (key_high + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _unit(words: Tensor) -> Tensor:
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _normal(words: Tensor) -> Tensor:
    """Box-Muller in float64 of the float32 angle: the correctly rounded value that float32 backends approach."""
    u = _unit(words)
    radius = torch.sqrt(-2 * torch.log(u[..., 0::2].double()))
    angle = (u[..., 1::2] * math.tau).double()  # rounded to float32, so that every backend sees the same angle
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2).float()


def _affine(unit: Tensor, scale: float, low: float) -> Tensor:
    """unit * span + low, rounded once, as a float32 fused multiply-add does."""
    span, low = float(np.float32(scale - low)), float(np.float32(low))
    if low == 0:
        return unit * span
    product = unit.double() * span  # exact
    total = product + low
    added = total - product
    error = (product - (total - added)) + (low - added)  # exact: total + error is the sum
    # The float64 neighbour with an odd last bit on the side of the error: rounded to float32, it gives what the exact
    # sum gives, where `total` may lie on a tie.
    towards = torch.nextafter(total, torch.copysign(torch.full_like(error, math.inf), error))
    even = (total.view(torch.int64) & 1) == 0
    return torch.where(even & (error != 0), towards, total).float()


def law_values(words: Tensor, law: Law, scale: float = 1.0, low: float | None = None) -> Tensor:
    """Words (..., 4) as int64 -> float32 values (..., v) of one of the laws above."""
    if law == "normal":
        return _normal(words) * scale
    if law == "uniform":
        return (2 * _unit(words) - 1) * scale if low is None else _affine(_unit(words), scale, low)
    if law == "uniform8":
        bytes_ = ((words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)) & 255).flatten(-2).float()
        return ((2 * bytes_ - 255) / 256) * scale if low is None else _affine((bytes_ + 0.5) / 256, scale, low)
    bits = ((words.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)
    return (1 - 2 * bits).float() * scale


def random_rows(
    state: Tensor,
    index: Tensor,
    cols: int,
    law: Law = "uniform",
    scale: float = 1.0,
    low: float | None = None,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(len(index), cols) elements: rows `index` (int64 tensor), columns from `first` on, of the matrix of `state`
    (int64 tensor: seed, stream, step)."""
    check_state(state)
    scale, low = _check_law(law, scale, low)
    checks.integer("index", index, "row numbers are expected")
    checks.dims("index", index, (1,), "(rows,)")
    checks.same_device(state=state, index=index)
    cols = checks.integer_between("cols", cols, 0, 2**32 + 1)
    first = checks.integer_between("first", first, 0, 2**32 + 1 - cols)
    check_dtype(dtype)
    return _rows(state, index, (first, first + cols), law, scale, low, dtype)


def _rows(
    state: Tensor,
    index: Tensor | range,
    columns: tuple[int, int],
    law: Law,
    scale: float,
    low: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """`random_rows`, in the fastest way that there is."""
    v, traced = VALUES_PER_CALL[law], _traced(state, index)
    if (law == "normal" or low) and float64.lacks(state.device):
        index = index if isinstance(index, range) else index.cpu()
        return _rows(state.cpu(), index, columns, law, scale, low, dtype).to(state.device)
    if state.device.type == "cpu" and not traced and dtype in _OF_NUMPY:
        rows = np.arange(index.start, index.stop) if isinstance(index, range) else index.numpy()
        made = philox_numpy.rows(state.numpy(), rows, columns, law, v, scale, low, str(dtype)[6:])
        return torch.from_numpy(made).view(dtype)
    if isinstance(index, range):
        index = torch.arange(index.start, index.stop, device=state.device)
    size = index.shape[0] * (columns[1] - columns[0])
    if not traced and size and _compiled_is_right(state.device, law, low is not None):
        return philox_cuda.rows(state, index.long(), columns, law, v, scale, low, dtype)
    return _rows_in_torch(state, index.long(), columns, law, scale, low, dtype)


def _traced(*tensors: Any) -> bool:
    """Whether the tensors stand for others, so that nobody but torch can compute with them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, range) for t in tensors)
    )


_compiled_verdicts: dict[tuple[torch.device, str, bool], bool] = {}


def _compiled_is_right(device: torch.device, law: Law, has_low: bool) -> bool:
    """Whether `philox_cuda.rows` has given the words and values of 64 counters on this device."""
    key = device, law, has_low
    if key not in _compiled_verdicts:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a comparison waits for the device
            return False
        try:
            _compiled_verdicts[key] = _compare_compiled(device, law, has_low)
        except Exception:  # no compiler beside this torch, say
            _compiled_verdicts[key] = False
    return _compiled_verdicts[key]


def _compare_compiled(device: torch.device, law: Law, has_low: bool) -> bool:
    state = torch.tensor([0x0123456789ABCDEF, 0xFEDCBA98, 0x89ABCDEF], dtype=torch.int64, device=device)
    row, block = torch.arange(2**32 - 8, 2**32, device=device), torch.arange(8, device=device)
    seed, stream, step = state.unbind()
    expected = philox(block, row.unsqueeze(1), step, stream, seed & _MASK, (seed >> 32) & _MASK)
    if not torch.equal(philox_cuda.words(block, row.unsqueeze(1), state).long() & _MASK, torch.stack(expected, -1)):
        return False
    v, low = VALUES_PER_CALL[law], 0.1 if has_low else None
    ours = philox_cuda.rows(state, row, (3, 8 * v), law, v, 0.7, low, torch.float32)
    right = _rows_in_torch(state, row, (3, 8 * v), law, 0.7, low, torch.float32)
    return torch.allclose(ours, right, rtol=2**-21, atol=0) if law == "normal" else torch.equal(ours, right)


def _rows_in_torch(
    state: Tensor,
    index: Tensor,
    columns: tuple[int, int],
    law: Law,
    scale: float,
    low: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """`random_rows` in over a thousand operations, for any device and for graphs."""
    v = VALUES_PER_CALL[law]
    cols = columns[1] - columns[0]
    first, skip = divmod(columns[0], v)
    blocks = (skip + cols + v - 1) // v
    seed, stream, step = state.unbind()
    key, stream, step = (seed & _MASK, (seed >> 32) & _MASK), stream & _MASK, step & _MASK
    block = torch.arange(first, first + blocks, device=state.device)
    rows, index = index.shape[0], index & _MASK
    out = torch.empty(rows, cols, dtype=dtype, device=state.device)
    at_once = max(1, _BLOCKS_AT_ONCE // max(blocks, 1))
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        words = torch.stack(
            torch.broadcast_tensors(*philox(block, index[start:stop].unsqueeze(1), step, stream, *key)), -1
        )
        out[start:stop] = law_values(words, law, scale, low).flatten(1)[:, skip : skip + cols]
    return out


def random_matrix(
    state: Tensor,
    rows: int,
    cols: int,
    law: Law = "uniform",
    scale: float = 1.0,
    low: float | None = None,
    *,
    offset: Sequence[int] = (0, 0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(rows, cols) elements of the matrix of `state` (int64 tensor: seed, stream, step) from (row, col) `offset` on."""
    check_state(state)
    rows = checks.integer_between("rows", rows, 0, 2**32 + 1)
    cols = checks.integer_between("cols", cols, 0, 2**32 + 1)
    if not isinstance(offset, (tuple, list)):
        raise TypeError(f"offset must be (row, col), got {type(offset).__name__}")
    row, col = checks.pair("offset", offset, 0, 2**32)
    if row + rows > 2**32 or col + cols > 2**32:
        raise ValueError(
            f"offset must keep rows and columns within [0, 2**32), got {tuple(offset)} for a ({rows}, {cols}) matrix"
        )
    check_dtype(dtype)
    scale, low = _check_law(law, scale, low)
    return _rows(state, range(row, row + rows), (col, col + cols), law, scale, low, dtype)


def _native_matrix(
    state: Tensor,
    size: tuple[int, int],
    law: Law,
    scale: float,
    low: float | None,
    offset: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """By the C++ kernel, where there is one."""
    if (
        not isinstance(dtype, torch.dtype)
        or dtype not in _OF_NUMPY
        or state.device.type != "cpu"
        or (state.dtype, tuple(state.shape), state.is_contiguous()) != (torch.int64, (3,), True)
        or _traced(state)
    ):
        return None
    kernels = native.cpu_entries()
    if kernels is None or not math.prod(size):
        return None
    made = dtype if dtype in _NATIVE_DTYPES else torch.float32
    out = torch.empty(size, dtype=made, device=state.device)  # whatever the default device is
    formula = (*size, None, None, state.data_ptr(), law, scale, low, 1.0, False)
    kernels.feedback_matrix(formula, *offset, out.data_ptr(), _NATIVE_DTYPES[made], native.threads())
    return out.to(dtype)


class RandomFeedback(Carried):
    """A feedback matrix given by (seed, stream, step) and a law, generated where it is used.

    The state is one int64 tensor (seed, stream, step) of 24 bytes, a non-persistent buffer: it follows the module by
    value (`to_empty` included; from the meta device it comes back at step 0), appears in no `state_dict`, is never a
    parameter, and has the module's seed and stream (`set_state` changes them; an average is undone). A tensor shape
    maps to the matrix as (shape[0], flattened rest): a weight's (out, in * kh * kw), a DFA projection's (class,
    neuron), a noise's (sample, unit).

    Args:
        seed: 64-bit integer. stream: integer in [0, 2**32), one per layer.
        law: "uniform", "normal", "sign" or "uniform8"; `scale` (> 0) and `low` (uniform laws only, < scale) as in
            the module's docstring.

    >>> feedback = RandomFeedback(seed=1, law="sign", scale=0.5)
    >>> torch.equal(feedback.materialize((2, 3)), feedback.materialize((8, 9))[:2, :3])
    True
    """

    state: Tensor

    def __init__(
        self, seed: int, stream: int = 0, law: Law = "uniform", scale: float = 1.0, low: float | None = None
    ) -> None:
        super().__init__()
        seed = checks.integer_between("seed", seed, -(2**63), 2**64)
        self.stream = checks.integer_between("stream", stream, 0, 2**32)
        self.seed = seed - 2**64 if seed >= 2**63 else seed
        self.law: Law = law
        self.scale, self.low = _check_law(law, scale, low)
        with torch.inference_mode(False):  # a state made under inference mode could not advance outside of it
            words = [self.seed, self.stream, 0]
            state = torch.tensor(words, dtype=torch.int64, device=None)  # torch's default device
            self.register_buffer("state", state, persistent=False)

    def materialize(
        self,
        shape: int | Sequence[int],
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: Sequence[int] = (0, 0),
    ) -> Tensor:
        """The tensor of `shape` on `device` (default: the state's) in `dtype` (default float32; rounded once).

        `offset`: (row, col) of its first element in the matrix, for shards. On the CPU the C++ kernel makes it, where
        there is one, with the bits of `random_matrix`; normal within 4 ulp, and with the same bits in every slice."""
        shape = checks.sizes("shape", shape, "the sizes of a tensor of at least one dimension")
        checks.device("device", device)
        dtype = torch.float32 if dtype is None else dtype
        rows, cols = shape[0], math.prod(shape[1:])
        if max(rows, cols) > 2**32:
            raise ValueError(f"shape must be at most 2**32 rows and columns, got {shape}")
        state = self.verified() if device is None else self.verified().to(device)
        law = self.law, self.scale, self.low
        made = None
        if isinstance(offset, (tuple, list)):
            row, col = checks.pair("offset", offset, 0, 2**32)
            if row + rows <= 2**32 and col + cols <= 2**32:
                made = _native_matrix(state, (rows, cols), *law, (row, col), dtype)
        if made is None:
            made = random_matrix(state, rows, cols, *law, offset=offset, dtype=dtype)
        return made.view(shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The state that the constructor sets: step 0."""
        self.set_state(self.seed, self.stream, 0)

    @torch.no_grad()
    def set_state(self, seed: int, stream: int, step: int) -> None:
        """Another matrix: as three integers of `state.tolist()`."""
        words = [checks.whole_number(n, v) for n, v in (("seed", seed), ("stream", stream), ("step", step))]
        self.seed, self.stream, _ = words
        self.state.copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))

    def known(self, name: str) -> Tensor:
        return torch.tensor([self.seed, self.stream, 0], dtype=torch.int64, device="cpu")

    def verified(self) -> Tensor:
        """The state, for its use: looked at where something has written to it since the last time."""
        return verified(self)

    @torch.no_grad()
    def advance(self, skipped: Tensor | None = None) -> None:
        """Next step, so another matrix: an addition on the device, safe in CUDA graphs. Nothing else moves it.
        `skipped`: a tensor of one number that is not 0 where nothing is to move."""
        if skipped is not None:
            checks.tensor("skipped", skipped)
            if skipped.numel() != 1:
                raise ValueError(f"skipped must hold one number, got shape {checks.shape_of(skipped)}")
        with own_write(self):  # a look at every step would wait for the device
            self.state[2].add_(1 if skipped is None else (skipped == 0).to(self.state).sum())

    def extra_repr(self) -> str:
        low = "" if self.low is None else f", low={self.low:g}"
        return f"law={self.law}, scale={self.scale:g}{low}"


def _check_law(law: Any, scale: Any, low: Any) -> tuple[float, float | None]:
    """`(scale, low)` as floats."""
    checks.choice("law", law, tuple(VALUES_PER_CALL))
    checks.number("scale", scale)
    scale = checks.positive("scale", scale)
    if low is not None:
        if law not in ("uniform", "uniform8"):
            raise ValueError(f"low must be None for law={law!r} (uniform laws alone have a low end), got {low!r}")
        low = checks.number("low", low)
        if low >= scale:
            raise ValueError(f"low must be below scale={scale!r}, got {low!r}")
        if scale - low > torch.finfo(torch.float32).max:
            raise ValueError(f"low must be so near to scale={scale!r} that float32 holds their difference, got {low!r}")
    return scale, low
