"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.trial import Trial

_STATE = ("state",)


def _whole_numbers(a):
    """Batch Manhattan steps by the gradient's sign: its sums are exact then, so that no rounding turns a sign."""
    if a["manhattan"]:
        a["grad"].round_()
        a["x"].round_()


TRIALS = {
    "feedback_product": Trial(rows=("grad",), kept=_STATE, length=lambda a: a["grad"].shape[1]),
    "feedback_matrix": Trial(rows=("weight", "magnitude"), counts=("rows",), kept=_STATE, length=lambda a: 1),
    "feedback_rows": Trial(rows=("index",), indices={"index": lambda a: 1 << 40}, kept=_STATE, length=lambda a: 1),
    "feedback_pack_signs": Trial(rows=("weight",), length=lambda a: 1),
    "feedback_update_": Trial(
        rows=("grad", "x"),
        mutates=("weight", "momentum_buffer"),
        plant=_whole_numbers,
        length=lambda a: a["grad"].shape[0],
    ),
}
