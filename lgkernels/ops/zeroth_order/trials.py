"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.cuts import Size
from ...core.trial import Trial

TRIALS = {
    "perturbed_linear": Trial(
        sizes=lambda a: (Size((("weight", 0), ("bias", 0))), Size((("x", 2), ("weight", 1), ("values", 1)))),
        kept=("states",),
        length=lambda a: a["weight"].shape[1],
    ),
    # a part of a group, of a weight, is convolved by the library: the outputs stay
    "perturbed_conv2d": Trial(
        sizes=lambda a: (Size((("x", 1),), None), Size((("x", 3),), None), Size((("x", 4),), None)),
        kept=("states",),
        length=lambda a: a["weight"][0].numel(),
        library=(0,),
    ),
    "perturbed_rows": Trial(
        sizes=lambda a: (Size((("weight", 0),)), Size((("weight", 1), ("values", 1))), Size((("x", 1),))),
        indices={"x": lambda a: len(a["weight"])},
        kept=("states",),
        length=lambda a: 2,
    ),
    "formula_update_": Trial(
        sizes=lambda a: (Size((("weight", 0),)), Size((("weight", 1),))),
        kept=("states",),
        mutates=("weight",),
        length=lambda a: len(a["coefficients"]) + 1,
    ),
}
