"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

import math

from ...core.trial import Trial
from . import magnitudes


def _all_of(name):
    return lambda a: math.prod(a[name].shape)


TRIALS = {
    "local_cross_entropy": Trial(
        rows=("h", "target"),
        indices={"target": lambda a: a["weight"].shape[0]},
        magnitudes=magnitudes,
        length=_all_of("h"),
    ),
    "local_cross_entropy_backward": Trial(
        rows=("scale", "pooled", "grad_logits", "grad_pooled"), length=_all_of("pooled")
    ),
    "goodness": Trial(rows=("h", "is_positive"), length=_all_of("h")),
    "goodness_backward": Trial(rows=("h", "kappa"), length=lambda a: 1),
    "similarity": Trial(
        rows=("x", "target"), indices={"target": lambda a: a["num_classes"]}, magnitudes=magnitudes, length=_all_of("x")
    ),
    "similarity_backward": Trial(rows=("x", "grad", "mean"), length=lambda a: a["x"].shape[0]),
}
