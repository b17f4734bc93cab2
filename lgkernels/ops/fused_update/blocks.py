"""States of 8 bits: blockwise dynamic quantization, and its definition in plain torch.

A row of a matrix (N, K) is cut into blocks of 256 entries, the last one as long as what is left. A block is held as its
largest absolute value `absmax` (float32) and for each entry the `code` (uint8) of the value in [-1, 1] nearest to
x / absmax, a tie to the smaller one. These values ("dynamic tree": Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit
Optimizers via Block-wise Quantization", ICLR 2022, section 2.1) are 0, 1, and in each decade [10^(i-7), 10^(i-6)],
i = 0..6, the middles of

    2^i equal parts, and their negatives   (signed: the first moment, momentum)
    2^(i+1) equal parts                    (unsigned: the second moment)

256 in all, in rising order. Where K is a multiple of 256 the blocks are those of bitsandbytes, which cuts the whole
matrix. Two rules beside the paper's: a positive second moment never becomes 0, by which Adam divides (Li, Chen, Zhu,
"Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, section 4.1), and a block with an entry that is not
finite is NaN as a whole, its absmax as well.
"""

import torch
from torch import Tensor

from ...core.kept import kept

BLOCK = 256
_DECADES = 7


def blocks_of(columns: int) -> int:
    """How many blocks a row has."""
    return -(-columns // BLOCK)


def values(signed: bool) -> list[float]:
    """The 256 values, in the order of their codes."""
    found = [0.0, 1.0]
    for i in range(_DECADES):
        parts = 2**i if signed else 2 ** (i + 1)
        middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (d + 0.5) / parts) for d in range(parts)]
        found += middles + [-m for m in middles] * signed
    return sorted(found)


@kept
def _values(signed: bool, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values(signed), dtype=dtype, device="cpu")


@kept
def _middles(signed: bool, dtype: torch.dtype) -> Tensor:
    made = torch.tensor(values(signed), dtype=torch.float64, device="cpu")
    return ((made[1:] + made[:-1]) / 2).to(dtype)


def decoded(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values (N, K) that codes (N, K) and absmax (N, ceil(K / 256)) hold."""
    scale = absmax.to(dtype).repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    return _values(codes.device, signed, dtype)[codes.int()] * scale


def encode_(codes: Tensor, absmax: Tensor, signed: bool, x: Tensor) -> None:
    """Codes and absmax become those of x (N, K), float32 or float64."""
    rows, columns = x.shape
    blocks = torch.nn.functional.pad(x, (0, blocks_of(columns) * BLOCK - columns)).view(rows, -1, BLOCK)
    largest = blocks.abs().amax(2)
    absmax.copy_(torch.where(largest < float("inf"), largest, float("nan")))
    quotient = torch.where((absmax > 0)[..., None], blocks / absmax[..., None].to(x.dtype), 0)
    found = torch.bucketize(quotient, _middles(x.device, signed, x.dtype), out_int32=True)
    if not signed:
        found = torch.maximum(found, (quotient > 0).to(found.dtype))
    codes.copy_(found.reshape(rows, -1)[:, :columns])


def encoded(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of x (N, K)."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(x.shape[0], blocks_of(x.shape[1]), dtype=torch.float32, device=x.device)
    encode_(codes, absmax, signed, x if x.dtype == torch.float64 else x.float())
    return codes, absmax
