"""How the family's kernels prove themselves on a user's GPU (core/trial.py): on the caller's net, with weights that let
it settle, few samples and few steps."""

from ...core.tiles import power_of_two
from ...core.trial import Trial

_FEW = {2: 261, 4: 3}  # samples, by dimensions of a state: of a dense net so many that they choose all blocks
_STEPS = 3


def _rows(a):
    return len(a["state"][0]) // max(len(a["drive"][0]), 1)


def _net_kind(a):
    """What the net chooses: its sizes, its edges, the words, what the rows are, and how many, by powers of two."""
    state, steps = a["state"], min(a["steps"], _STEPS)
    target, readout = a["target"], a["readout"]
    return (
        str(state[0].dtype),
        tuple(tuple(v.shape[1:]) for v in state),
        tuple(a["edges"]),
        None if target is None else tuple(target.shape[1:]),
        readout is None,
        a["readout_bias"] is None,
        len(a["biases"]),
        (a["activation"], a["loss"], a["schedule"], steps, a["tolerance"] is None),
        power_of_two(len(state[0])),
    )


def _settle_kind(a):
    return _net_kind(a), a["real_phases"], len(a["beta_real"])


def _error_kind(a):
    return _net_kind(a), a["points"]


def _few(a):
    """The same call of fewer samples and steps. A tolerance is one that no sample comes near: near it, the float64
    truth may stop at another step."""
    samples = min(len(a["drive"][0]), _FEW[a["state"][0].dim()])
    rows = samples * _rows(a)
    return {
        **a,
        "state": [v[:rows] for v in a["state"]],
        "drive": [v[:samples] for v in a["drive"]],
        "target": a["target"] if a["target"] is None else a["target"][:samples],
        "steps": min(a["steps"], _STEPS),
        "tolerance": None if a["tolerance"] is None else 1e-30,
    }


def _settling(a):
    """Gains below 1, and states away from the poles of the activations."""
    for w in a["weights"]:
        w.mul_(0.5 / w.shape[1:].numel() ** 0.5 if w.dim() == 4 else 0.5 / w.shape[0] ** 0.5)
    for v in a["state"]:
        v.mul_(0.2)


def _terms(a):
    """Of a unit's sum over three steps."""
    return _STEPS * (sum(w[0].numel() if w.dim() == 4 else w.shape[0] for w in a["weights"]) + 64)


def _homeostasis_kind(a):
    shapes = tuple(tuple(w.shape) for w in a["weights"])
    return str(a["weights"][0].dtype), shapes, tuple(a["edges"]), a["estimator"]


def _few_rows(a):
    return {**a, "eps": [e[:64] for e in a["eps"]]}


def _scaled(a):
    for w in a["weights"]:
        w.mul_(0.5 / w.shape[0] ** 0.5)


TRIALS = {
    "equilibrium_settle": Trial(length=_terms, kind=_settle_kind, example=_few, plant=_settling),
    "equilibrium_error": Trial(length=_terms, kind=_error_kind, example=_few, plant=_settling),
    "equilibrium_homeostasis": Trial(
        length=lambda a: 64 + sum(w.numel() for w in a["weights"]),
        kind=_homeostasis_kind,
        example=_few_rows,
        plant=_scaled,
    ),
}
