"""How the family's kernels prove themselves on a user's GPU (core/trial.py)."""

from ...core.trial import Trial


def _head(a):
    """Terms of the sums over patches, channels and classes."""
    return a["x"].shape[1:].numel() + a["weight"].shape[1]


def _norm(a):
    return a["z"].shape[a["dim"]] + 16  # and what a law's normal may be off


TRIALS = {
    "replicated_cross_entropy": Trial(
        rows=("x", "target"), indices={"target": lambda a: a["weight"].shape[1]}, length=_head
    ),
    "replicated_nt_xent": Trial(rows=("x", "y"), length=lambda a: _head(a) + 2 * len(a["x"])),
    "replicated_tangent": Trial(
        rows=("x_tangent", "x", "teach", "head_tangent"), length=lambda a: a["x_tangent"].shape[3]
    ),
    "replicated_cotangent": Trial(rows=("grad", "x", "teach"), length=lambda a: a["channels"]),
    "dual_norm": Trial(rows=("z", "z_tangent", "residual", "values"), kept=("state",), length=_norm),
    "activity_grad": Trial(rows=("z", "y", "coefficient", "values"), kept=("state",), length=_norm),
}
