"""Activations r = phi(u) of the units, real and (sigmoid, dsilu) complex, with their slopes.

sigmoid        1 / (1 + exp(2 - 4u))                                     Laborieux & Zenke 2024, Fashion-MNIST
dsilu          (u/2) s(u) + (1 - u/2) s(u - 2), s the logistic           the same, convolutional nets
hard_sigmoid   clip(u/2, 0, 1)                                           Laborieux et al. 2021
clipped_relu   clip(u, 0, 1)                                             Scellier & Bengio 2017, Ernoult et al. 2019
"""

import torch


def logistic(u):
    """1 / (1 + exp(-u)); for complex u by the exponential that does not overflow."""
    if not u.is_complex():
        return torch.sigmoid(u)
    positive = u.real >= 0
    w = torch.exp(torch.where(positive, -u, u))
    return torch.where(positive, 1 / (1 + w), w / (1 + w))


def activity(u, name):
    """phi(u)."""
    if name == "sigmoid":
        return logistic(4 * u - 2)
    if name == "dsilu":
        return u / 2 * logistic(u) + (1 - u / 2) * logistic(u - 2)
    return (u / 2 if name == "hard_sigmoid" else u).clamp(0, 1)


def slope(u, name):
    """phi'(u); of the clipped ones 0 where they are clipped, ends included."""
    if name == "sigmoid":
        s = logistic(4 * u - 2)
        return 4 * s * (1 - s)
    if name == "dsilu":
        s, s2 = logistic(u), logistic(u - 2)
        return (s - s2) / 2 + u / 2 * s * (1 - s) + (1 - u / 2) * s2 * (1 - s2)
    width = 2 if name == "hard_sigmoid" else 1
    return ((u > 0) & (u < width)).to(u.dtype) / width
