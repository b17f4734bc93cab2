"""inf and nan anywhere in an input come out where the reference says, in every backend: never silently finite.

Every op at the sizes of its door (`tests/<family>/doors.py`), one tensor and place at a time; and public functions at
sizes of whole vectors, tiles and remainders. CI runs this file for each instruction-set level of the CPU kernels.
"""

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.core import dispatch, trust
from lgkernels.random import RandomFeedback
from tests.conftest import MODULES
from tests.integration.test_door import DOORS, accepted, copied, places, replaced
from tests.support.calls import flat
from tests.support.problems import randn, targets

VALUES = (float("inf"), -float("inf"), float("nan"))


def spots(tensor):
    return sorted({0, tensor.numel() // 2, tensor.numel() - 1}) if tensor.numel() else []


def poisoned(tensor, spot, value):
    other = tensor.clone()
    other.view(-1)[spot] = value
    return other


COMPLEX = ("equilibrium_settle", "equilibrium_error")


def results(op, arguments, impl):
    """The outputs, and the arguments, which an op in place has changed (none of COMPLEX does)."""
    found = accepted(op, arguments, impl)
    found = found if op in COMPLEX else (found, arguments)
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def depend(results):
    """Where outputs depend on the value that was replaced: they differ between two ordinary ones. (A reference that
    multiplies by zeros spreads nan further.)"""
    return [one != two for one, two in zip(*results, strict=True)]


def lost(expected, found, depends):
    """How many elements of each of `found` are finite, and are not in `expected`."""
    return [
        int((found_.isfinite() & ~expected_.isfinite() & where).sum())
        for expected_, found_, where in zip(expected, found, depends, strict=True)
        if expected_.is_floating_point() or expected_.is_complex()
    ]


def all_lost(expected, found):
    """Of complex states, whose parts torch's own arithmetic mixes (an infinite u has a finite activation, but for a
    complex exponential of it): whether no value at all tells of it."""
    told = any(not t.isfinite().all() for t in expected if t.is_floating_point())
    return told and all(t.isfinite().all() for t in found if t.is_floating_point())


def backends(op):
    return dispatch.backends(trust.OPS[op].group)


@pytest.mark.parametrize("op", [op for _, op in DOORS])
@pytest.mark.only(where=lambda op, backend: backend != "reference" and MODULES.get(backend, backend) in backends(op))
def test_ops(op, impl):
    arguments = next(a for (_, name), a in DOORS.items() if name == op)
    wrong = []
    for place, name, tensor in places(op, arguments):
        if not tensor.is_floating_point():
            continue
        for spot in spots(tensor):
            with_ = {v: replaced(arguments, place, poisoned(tensor, spot, v)) for v in (0.25, -1.5, *VALUES)}
            depends = depend([results(op, with_[v], "reference") for v in (0.25, -1.5)])
            for value in VALUES:
                expected = results(op, [copied(a) for a in with_[value]], "reference")
                found = results(op, with_[value], impl)
                gone = [all_lost(expected, found)] if op in COMPLEX else lost(expected, found, depends)
                if any(gone):
                    wrong.append((name, spot, value, gone))
    assert not wrong, "\n".join(map(str, wrong))


def _lls(impl, x, *modulation, **options):
    return LF.lls_loss(x, targets(len(x), 6), *modulation, num_classes=6, impl=impl, **options)


def _direction(impl, x, weight, bias):
    return LF.sign_symmetric_linear(x, weight, bias, impl=impl)


def _formula(law):
    return lambda impl, x, weight: LF.feedback_linear(x, weight, feedback=RandomFeedback(1, law=law), impl=impl)


CASES = {  # name: (function of impl and tensors, the shapes of these)
    "lls, vectors": (lambda impl, x: _lls(impl, x, pool_size=40), [(5, 40)]),
    "lls, wide": (lambda impl, x, m: _lls(impl, x, m, pool_size=300, waveform="cosine"), [(70, 300), (6, 6)]),
    "lls, raw": (lambda impl, x: _lls(impl, x, pool_size=64, normalize=False), [(19, 64)]),
    "lls, maps": (lambda impl, x, m: _lls(impl, x, m, pool_size=2), [(5, 33, 6, 6), (6,)]),
    "lls, square": (lambda impl, x: _lls(impl, x, pool_size=2, loss="hard_sigmoid_mse"), [(5, 17, 4, 4)]),
    "usf": (_direction, [(9, 70), (35, 70), (35,)]),
    "usf, few rows": (_direction, [(2, 1040), (17, 1040), (17,)]),
    "frsf": (
        lambda impl, x, weight, m: LF.sign_symmetric_linear(x, weight, magnitude=m, impl=impl),
        [(9, 70), (35, 70), (35, 70)],
    ),
    "fa, tensor": (
        lambda impl, x, weight, f: LF.feedback_linear(x, weight, feedback=f, impl=impl),
        [(9, 70), (35, 70), (35, 70)],
    ),
    "fa, uniform8": (_formula("uniform8"), [(9, 70), (35, 70)]),
    "fa, sign": (_formula("sign"), [(130, 70), (35, 70)]),
    "usf, maps": (
        lambda impl, x, weight: LF.sign_symmetric_conv2d(x, weight, padding=1, impl=impl),
        [(3, 17, 7, 7), (9, 17, 3, 3)],
    ),
    "local cross entropy": (
        lambda impl, h, weight, bias: LF.local_cross_entropy(h, weight, bias, targets(len(h), 7), impl=impl),
        [(5, 35, 6, 6), (7, 35), (7,)],
    ),
    "local cross entropy, rows": (
        lambda impl, h, weight: LF.local_cross_entropy(h, weight, None, targets(len(h), 7), impl=impl),
        [(19, 70), (7, 70)],
    ),
    "goodness": (lambda impl, h: LF.goodness_loss(h, torch.arange(len(h)) % 2 == 0, impl=impl), [(5, 17, 6, 6)]),
    "goodness, sum": (
        lambda impl, h: LF.goodness_loss(h, torch.arange(len(h)) % 2 == 0, goodness="sum", impl=impl),
        [(19, 70)],
    ),
    "similarity": (
        lambda impl, h: LF.similarity_matching_loss(h, targets(len(h), 7), num_classes=7, impl=impl),
        [(5, 17, 6, 6)],
    ),
    "similarity, features": (
        lambda impl, h, s: LF.similarity_matching_loss(h, targets(len(h), 7), s, num_classes=7, impl=impl),
        [(35, 17), (17, 17)],
    ),
    "replicated cross entropy": (
        lambda impl, x, w, b: LF.replicated_cross_entropy(x, w, b, targets(len(x), 9), layer_norm=True, impl=impl),
        [(5, 3, 4, 17), (68, 9), (9,)],
    ),
    "replicated nt-xent": (
        lambda impl, x, y, w, b: LF.replicated_nt_xent(x, y, w, b, impl=impl),
        [(5, 3, 2, 17), (5, 3, 2, 17), (34, 9), (9,)],
    ),
    "dual norm": (
        lambda impl, z, t, r, n: LF.dual_norm_noise_relu(z, t, r, noise=n, impl=impl),
        [(5, 3, 70), (5, 3, 70), (5, 3, 70), (5, 3, 70)],
    ),
    "perturbed linear": (
        lambda impl, x, w, b: LF.perturbed_linear(x, w, b, noise=RandomFeedback(1), coefficients=0.1, impl=impl),
        [(3, 5, 70), (17, 70), (17,)],
    ),
}


def run(name, impl, tensors):
    """Outputs and gradients; None where this backend does not run the function."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = [t for t in flat(CASES[name][0](impl, *leaves)) if isinstance(t, torch.Tensor)]
    learning = [t for t in outputs if t.requires_grad]
    if learning:
        torch.autograd.backward(learning, [torch.ones_like(t) for t in learning])
    return [t.detach() for t in outputs] + [torch.zeros(()) if t.grad is None else t.grad for t in leaves]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.only(where=lambda backend: backend != "reference")
def test_functions(name, impl):
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(CASES[name][1])]
    try:
        run(name, impl, tensors)
    except ValueError as refused:
        assert f"impl={impl!r} can't run" in str(refused)
        return
    wrong = []
    for i, tensor in enumerate(tensors):
        for spot in spots(tensor):
            with_ = {v: [*tensors[:i], poisoned(tensor, spot, v), *tensors[i + 1 :]] for v in (0.25, -1.5, *VALUES)}
            depends = depend([run(name, "reference", with_[v]) for v in (0.25, -1.5)])
            for value in VALUES:
                if any(gone := lost(run(name, "reference", with_[value]), run(name, impl, with_[value]), depends)):
                    wrong.append((i, spot, value, gone))
    assert not wrong, "\n".join(map(str, wrong))
