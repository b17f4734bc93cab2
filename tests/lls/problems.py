"""Arguments for the functions of the family `lls`, and the comparison of one backend with the reference."""

from functools import partial

from lgkernels.ops.lls import basis, reference
from lgkernels.ops.lls.options import HeadOptions
from tests.support import problems
from tests.support.problems import randn


def head_arguments(classes, compute_grad=True, **options):
    """The last arguments of `head`."""
    return HeadOptions(classes, **options), compute_grad


def modulation(kind, rows, classes, seed=2):
    """kind: "none", "vector" (C,), "matrix" (K, C)."""
    if kind == "none":
        return None
    return randn(classes, seed=seed) if kind == "vector" else randn(rows, classes, seed=seed)


def table(module, waveform, rows, dim):
    """The basis in the form in which `module` takes it."""
    if waveform == "square" and module.CAPABILITIES.packed_basis:
        return basis.signs(rows, dim)
    return basis.table(rows, dim, waveform) if waveform in ("square", "cosine") else randn(rows, dim, seed=9)


def norm_arguments(channels, seed=4):
    """mean, rstd, gamma, beta of a batch norm, at unit scale; one gamma is negative."""
    mean, spread, gamma, beta = (randn(channels, seed=seed + i) for i in range(4))
    return 0.3 * mean, 1 / (0.5 + spread.abs()), gamma, 0.5 * beta


def areas(height, width, pool):
    """(P*P,) float32: positions in each bin."""
    rows, columns = (reference.bins(n, pool).sum(1).float() for n in (height, width))
    return (rows.unsqueeze(1) * columns).flatten()


check = partial(problems.check, reference=reference)


def check_head(module, x, target, m, waveform, classes, *, rows=None, phi=None, per_row=False, **options):
    rows, dim = rows or classes, x.shape[1]
    ours = phi if phi is not None else table(module, waveform, rows, dim)
    exact = phi if phi is not None else table(reference, waveform, rows, dim)
    last = head_arguments(classes, **options)
    return check(
        module,
        "head",
        (x, target, m, ours, *last),
        length=dim + rows,
        per_row=per_row,
        reference_arguments=(x, target, m, exact, *last),
    )
