"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.cuts import Size
from ...core.trial import Trial

_STATE = ("state",)
_COLUMNS = Size((("columns", 0), ("weight", 1), ("magnitude", 1)))


TRIALS = {
    "feedback_product": Trial(
        rows=("grad",),
        sizes=lambda a: (Size((("grad", 1), ("weight", 0), ("magnitude", 0))), _COLUMNS),
        kept=_STATE,
        length=lambda a: a["grad"].shape[1],
    ),
    "feedback_matrix": Trial(
        rows=("weight", "magnitude"), counts=("rows",), sizes=lambda a: (_COLUMNS,), kept=_STATE, length=lambda a: 1
    ),
    "feedback_rows": Trial(
        rows=("index",),
        indices={"index": lambda a: 1 << 40},
        sizes=lambda a: (Size((("columns", 0),)),),
        kept=_STATE,
        length=lambda a: 1,
    ),
    "feedback_pack_signs": Trial(rows=("weight",), sizes=lambda a: (Size((("weight", 1),)),), length=lambda a: 1),
}
