"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.trial import Trial

_STATE = ("state",)

TRIALS = {
    "feedback_product": Trial(rows=("grad",), kept=_STATE, length=lambda a: a["grad"].shape[1]),
    "feedback_matrix": Trial(
        rows=("weight", "magnitude"), counts=("rows",), kept=_STATE, length=lambda a: a["rows"] * a["columns"]
    ),
    "feedback_rows": Trial(rows=("index",), indices={"index": lambda a: 1 << 40}, kept=_STATE, length=lambda a: 1),
    "feedback_pack_signs": Trial(rows=("weight",), length=lambda a: 1),
    "feedback_update_": Trial(
        rows=("grad", "x"), mutates=("weight", "momentum_buffer"), length=lambda a: a["grad"].shape[0]
    ),
}
