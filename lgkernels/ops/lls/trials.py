"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

import math

import torch

from ...core.cuts import Size
from ...core.trial import Trial
from . import magnitudes

_WEIGHT_GRADIENT = 2  # place among a block's results


def _of_row(name):
    """Terms behind a row's results: all of its values, and what the head sums over classes and basis rows."""
    return lambda a: math.prod(a[name].shape[1:]) + a["num_classes"]


def _ignore_last(target, index):
    limits = torch.iinfo(target.dtype)
    if len(target) > 2 and limits.min <= index <= limits.max:
        target[-1] = index


def _plant(a):
    """A row of norm zero, and an ignored one."""
    if len(a["target"]) > 2:
        a["activation"][0] = 0
    _ignore_last(a["target"], a["ignore_index"])


def _block_length(a):
    x, weight = a["x"], a["weight"]
    positions = x.shape[0] * math.prod(x.shape[2:])
    return max(positions, math.prod(weight.shape[1:])) + a["num_classes"]


def _map(name):
    """Height and width of a feature map."""
    return Size(((name, 2),)), Size(((name, 3),))


def _block_sizes(a):
    of_inputs = Size((("x", 1), ("weight", 1)), together=None)
    if a["x"].dim() == 2:  # the outputs are pooled into latents
        return (of_inputs,)
    of_outputs = ("weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var")
    return (*_map("x"), of_inputs, Size([(name, 0) for name in of_outputs]))


_CLASSES = {"target": lambda a: a["num_classes"]}

TRIALS = {
    "lls_loss_forward": Trial(
        rows=("activation", "target"),
        indices=_CLASSES,
        sizes=lambda a: _map("activation"),
        plant=_plant,
        per_row=True,
        magnitudes=magnitudes,
        length=_of_row("activation"),
    ),
    "lls_loss_backward": Trial(
        rows=("grad_loss", "grad_latents", "similarity", "grad_logits"),
        counts=("shape",),
        sizes=lambda a: _map("shape"),
        length=lambda a: a["shape"][0],
    ),
    "lls_block": Trial(
        rows=("x", "target"),
        indices=_CLASSES,
        sizes=_block_sizes,
        positive=("running_var",),
        plant=lambda a: _ignore_last(a["target"], -100),
        mutates=("running_mean", "running_var"),
        library=(_WEIGHT_GRADIENT,),
        rounding="x",
        magnitudes=magnitudes,
        length=_block_length,
    ),
}
