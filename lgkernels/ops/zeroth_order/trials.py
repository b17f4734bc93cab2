"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.cuts import Size
from ...core.trial import Trial

TRIALS = {
    "perturbed_linear": Trial(
        sizes=lambda a: (Size((("weight", 0), ("bias", 0))), Size((("x", 2), ("weight", 1), ("values", 1)))),
        kept=("states",),
        length=lambda a: a["weight"].shape[1],
    ),
    "formula_update_": Trial(
        sizes=lambda a: (Size((("weight", 0),)), Size((("weight", 1),))),
        kept=("states",),
        mutates=("weight",),
        length=lambda a: len(a["coefficients"]) + 1,
    ),
}
