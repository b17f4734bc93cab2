"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.cuts import Size
from ...core.trial import Trial

_STATES = ("first", "second", "gradient")


def _plant(a):
    """Batch Manhattan steps by the gradient's sign: its sums are exact then, so that no rounding turns a sign."""
    if a["rule"] == "manhattan":
        a["grad"].round_()
        a["x"].round_()
        if a["gradient"] is not None:
            a["gradient"].round_()


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
    )
}
