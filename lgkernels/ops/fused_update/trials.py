"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.cuts import Size
from ...core.trial import Trial

_STATES = ("first", "second", "gradient")
_CODED = ("first", "first_max", "second", "second_max")


def _plant(a):
    """Batch Manhattan steps by the gradient's sign: its sums are exact then, so that no rounding turns a sign."""
    if a["rule"] == "manhattan":
        a["grad"].round_()
        a["x"].round_()
        if a["gradient"] is not None:
            a["gradient"].round_()


def _plant_codes(a):
    """As `_plant`; Adam divides by the root of a second moment far from 0."""
    _plant(a)
    if a["second"] is not None:
        a["second"].clamp_(min=160)


TRIALS = {
    "fused_update_": Trial(
        rows=("grad", "x"),
        sizes=lambda a: (
            Size((("weight", 0), *((name, 0) for name in _STATES), ("grad", 1))),
            Size((("weight", 1), *((name, 1) for name in _STATES), ("x", 1))),
        ),
        mutates=("weight", "first", "second"),
        positive=("second",),
        plant=_plant,
        length=lambda a: a["grad"].shape[0],
    ),
    "fused_update_8bit_": Trial(
        rows=("grad", "x"),
        sizes=lambda a: (Size((("weight", 0), *((name, 0) for name in _CODED), ("gradient", 0), ("grad", 1))),),
        mutates=("weight", *_CODED),
        codes=("first", "second"),
        positive=("first_max", "second_max"),
        plant=_plant_codes,
        length=lambda a: a["grad"].shape[0],
    ),
}
