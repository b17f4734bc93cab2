"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

import math

from ...core.cuts import Size
from ...core.trial import Trial
from . import magnitudes


def _all_of(name):
    return lambda a: math.prod(a[name].shape)


def _others(name, together):
    """Sizes of a tensor but the first."""
    return lambda a: [Size(((name, dim),), together) for dim in range(a[name].dim() - 1, 0, -1)]


def _cross_entropy_sizes(a):
    dim = a["h"].dim()
    channels = 1 if dim == 4 else dim - 1
    positions = [Size((("h", d),)) for d in range(1, dim) if d != channels]
    return (*positions, Size((("h", channels), ("weight", 1))), Size((("weight", 0), ("bias", 0))))


def _similarity_backward_sizes(a):
    flat = not a["mean"].numel()  # then the gradient has every element of a row
    of_grad = ("grad", 1), ("mean", 1)
    return [Size((("x", d), *(of_grad if flat or d == 1 else ()))) for d in range(a["x"].dim() - 1, 0, -1)]


TRIALS = {
    "local_cross_entropy": Trial(
        rows=("h", "target"),
        indices={"target": lambda a: a["weight"].shape[0]},
        sizes=_cross_entropy_sizes,
        magnitudes=magnitudes,
        length=_all_of("h"),
    ),
    "local_cross_entropy_backward": Trial(
        rows=("scale", "pooled", "grad_logits", "grad_pooled"),
        sizes=lambda a: (Size((("pooled", 1), ("grad_pooled", 1))), Size((("grad_logits", 1),))),
        length=_all_of("pooled"),
    ),
    "goodness": Trial(rows=("h", "is_positive"), sizes=_others("h", together=1), length=_all_of("h")),
    "goodness_backward": Trial(rows=("h", "kappa"), sizes=_others("h", together=1), length=lambda a: 1),
    "similarity": Trial(
        rows=("x", "target"),
        indices={"target": lambda a: a["num_classes"]},
        sizes=_others("x", together=2),
        magnitudes=magnitudes,
        length=_all_of("x"),
    ),
    "similarity_backward": Trial(
        rows=("x", "grad", "mean"), sizes=_similarity_backward_sizes, length=lambda a: a["x"].shape[0]
    ),
}
