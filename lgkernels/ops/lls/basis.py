"""The periodic basis: frequencies, table, and the bit-packed signs of the square waveform."""

import torch

from ...core.kept import kept


@kept
def _table(rows, dim, waveform, min_freq, max_freq):
    # The canonical Phi is torch.linspace and an accurate float32 sine on the CPU: other linspaces differ by one ulp,
    # up to 0.06 rad at column 2047, and the product must be rounded to float32 before the sine.
    frequency = torch.linspace(min_freq, max_freq, rows, dtype=torch.float32, device="cpu")
    phi = torch.sin(frequency.unsqueeze(1) * torch.arange(dim, dtype=torch.float32, device="cpu"))
    return torch.sign(phi) if waveform == "square" else phi


@kept
def _signs(rows, dim, min_freq, max_freq):
    return pack_signs(table(rows, dim, "square", min_freq, max_freq))


def table(rows, dim, waveform="square", min_freq=50.0, max_freq=512.0, device=None):
    """Cached (rows, dim) float32 table on `device` (shared: do not write to it)."""
    return _table(torch.device(device or "cpu"), rows, dim, waveform, float(min_freq), float(max_freq))


def signs(rows, dim, min_freq=50.0, max_freq=512.0, device=None):
    """Cached bit-packed square table (rows, ceil(dim / 32)) int32 on `device`; see `pack_signs`."""
    return _signs(torch.device(device or "cpu"), rows, dim, float(min_freq), float(max_freq))


def pack_signs(phi):
    """(K, d) table of +-1 with column 0 zero -> (K, ceil(d/32)) int32; bit j%32 of word j//32 is 1 where phi < 0.

    Column 0, sin(0) = 0, is the only zero: readers of the packed table treat it as zero themselves.
    """
    rows, dim = phi.shape
    negative = torch.zeros(rows, (dim + 31) // 32 * 32, dtype=torch.int64, device=phi.device)
    negative[:, :dim] = phi < 0
    words = (negative.view(rows, -1, 32) << torch.arange(32, device=phi.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_signs(words, dim):
    """Inverse of `pack_signs`: (K, dim) float32 of -1, 0 (column 0), +1."""
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    phi = 1.0 - 2.0 * bits.flatten(1)[:, :dim].float()
    phi[:, :1] = 0
    return phi
