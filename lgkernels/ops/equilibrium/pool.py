"""The softmax pool, 2x2 with stride 2, and its derivatives, real and complex; odd borders are left out.

o = sum_i p_i z_i,  p = softmax(z / T)         over the four entries of a window
q_i = do/dz_i = p_i (1 + (z_i - o) / T)
d(sum_i v_i q_i)/dz_j = (v_j (q_j + p_j) - p_j (v . q) - q_j (v . p)) / T        (the second derivative, symmetric)
"""

import torch


def windows(z):
    """(..., H, W) -> (..., H // 2, W // 2, 4)."""
    height, width = z.shape[-2] // 2, z.shape[-1] // 2
    parts = z[..., : 2 * height, : 2 * width].unflatten(-2, (height, 2)).unflatten(-1, (width, 2))
    return parts.transpose(-3, -2).flatten(-2)


def scattered(entries, like):
    """The entries (..., h, w, 4) at their places of a map shaped (..., H, W) as `like`; 0 at odd borders."""
    height, width = entries.shape[-3:-1]
    maps = entries.unflatten(-1, (2, 2)).transpose(-3, -2).reshape(*entries.shape[:-3], 2 * height, 2 * width)
    rest = like.shape[-2] - 2 * height, like.shape[-1] - 2 * width
    return torch.nn.functional.pad(maps, (0, rest[1], 0, rest[0])) if any(rest) else maps


def pooled(z, temperature=1.0):
    """`(o, p, q)` of a map's windows."""
    entries = windows(z)
    real = entries.real if entries.is_complex() else entries
    w = torch.exp((entries - real.detach().amax(-1, keepdim=True)) / temperature)
    p = w / w.sum(-1, keepdim=True)
    o = (p * entries).sum(-1)
    return o, p, p * (1 + (entries - o.unsqueeze(-1)) / temperature)


def curved(v, p, q):
    """The second derivative along v (..., 4), at temperature 1."""
    return v * (q + p) - p * (v * q).sum(-1, keepdim=True) - q * (v * p).sum(-1, keepdim=True)
