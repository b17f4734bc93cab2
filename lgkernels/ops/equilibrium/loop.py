"""The loop of a backend that starts its steps one by one: when it ends, and what it reports."""

import torch


def repeated(step, moved, options, samples_like):
    """`(steps taken, steps (P, B), residual, orbit)`.

    step(t): makes step number t, from 0 on. moved(t, back): (P, B) norms of the move from step t - back to step t, both
    counted from 1; the start is 0. samples_like: a (P, B) tensor.
    """
    settled = taken = None
    for t in range(options.steps):
        step(t)
        taken = t + 1
        if options.tolerance is None:
            continue
        residual, orbit = _moves(moved, taken, samples_like)
        done = torch.minimum(residual, orbit) <= options.tolerance
        never = torch.full_like(residual, options.steps + 1)
        settled = torch.where(done, (never if settled is None else settled).clamp(max=taken), never)
        if bool(done.all()):
            break
    taken = taken or 0
    residual, orbit = _moves(moved, taken, samples_like)
    steps = torch.full_like(residual, taken) if settled is None else settled.clamp(max=taken)
    return taken, steps.long(), residual, orbit


def _moves(moved, taken, samples_like):
    """Of the last step and the last two; inf where there were fewer."""
    return tuple(moved(taken, k) if k <= taken else torch.full_like(samples_like, torch.inf) for k in (1, 2))


def by_kind(settle, state, drive, net, target, phases, options):
    """Real phases and complex ones each by themselves: they do not meet. settle: of phases of one kind."""
    samples, real = len(state[0]) // phases.rows, phases.real_phases
    results, row = [], 0
    for some, own_real in ((slice(0, real), real), (slice(real, phases.many), 0)):
        own = type(phases)(phases.beta_real[some], phases.beta_imag[some], own_real)
        if own.many:
            rows = own.rows * samples
            results.append(settle([u[row : row + rows] for u in state], drive, net, target, own, options))
            row += rows
    if len(results) == 1:
        return results[0]
    states, *reports = zip(*results)
    return [torch.cat(rows) for rows in zip(*states)], *(torch.cat(parts) for parts in reports)
