"""Instruments: how far a layer's feedback is from its weight."""

import math
from typing import Any

import torch
from torch import nn

from ..core import constructors
from ..core.float64 import double
from ..core.whole import gathered
from .feedback_layer import FeedbackLayer

__all__ = ["alignment", "weight_ratio"]

_ELEMENTS_AT_ONCE = 1 << 20


@torch.no_grad()
def _products(layer: FeedbackLayer) -> list[float]:
    """<W, F>, |W|^2, |F|^2 in float64, over blocks of rows: F exists a block at a time."""
    weight = gathered(layer.weight.detach()).flatten(1)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(weight.shape[1], 1))
    total: Any = 0.0
    for start in range(0, weight.shape[0], at_once):
        feedback = double(layer.feedback_rows(start, min(start + at_once, weight.shape[0])))
        w = double(weight[start : start + at_once])
        total = total + torch.stack(((w * feedback).sum(), w.square().sum(), feedback.square().sum()))
    return total.tolist() if len(weight) else [0.0, 0.0, 0.0]


def _layers(model: nn.Module) -> list[tuple[str, FeedbackLayer]]:
    constructors.module("model", model)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FeedbackLayer)]


def alignment(model: nn.Module) -> dict[str, float]:
    """Angle between the weight W and the feedback F of each converted layer, in degrees.

    0 is back-propagation, 90 unrelated feedback; cos = <W, F> / (|W| |F|). F is made a block of rows at a time.

    Args:
        model (nn.Module): a model with layers of :func:`lgkernels.nn.convert`, or such a layer. Where `fully_shard` has
            sharded it, all ranks call this together.

    Returns:
        dict: qualified name -> float; nan where W or F is zero.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.SignSymmetricLinear(2, 1, bias=False)
        >>> layer.weight.data.copy_(torch.tensor([[3.0, -4.0]])) is None
        False
        >>> round(lnn.alignment(layer)[""], 2)
        8.13
    """
    angles = {}
    for name, layer in _layers(model):
        dot, weight, feedback = _products(layer)
        cosine = dot / math.sqrt(weight * feedback) if weight and feedback else math.nan
        angles[name] = math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if cosine == cosine else math.nan
    return angles


def weight_ratio(model: nn.Module) -> dict[str, float]:
    """|F| / |W| (Frobenius norms) of each converted layer, F made a block of rows at a time.

    Args:
        model (nn.Module): as :func:`alignment`.

    Returns:
        dict: qualified name -> float; nan where W is zero.

    Example:
        >>> import torch, lgkernels.nn as lnn
        >>> layer = lnn.SignSymmetricLinear(2, 1, bias=False, scale=2.5)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> round(lnn.weight_ratio(layer)[""], 4)
        0.7071
    """
    return {
        name: math.sqrt(feedback / weight) if weight else math.nan
        for name, layer in _layers(model)
        for _, weight, feedback in [_products(layer)]
    }
