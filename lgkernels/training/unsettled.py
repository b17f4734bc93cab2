"""What did not settle in a batch of a net that settles."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Unsettled(NamedTuple):
    """What did not settle in a batch.

    phase: ``"beta=..."``, the nudge; ``"free"``; ``"error"`` where only the input or the result is no number. samples:
    places in the batch. residual: of each of these, the norm of the phase's last step (nan, inf: it diverged).
    """

    phase: str
    samples: list[int]
    residual: list[float]


class UnsettledError(RuntimeError):
    """A phase did not settle, and ``unsettled="raise"``; `.report` is a list of :class:`Unsettled`.

    Both are names of ``lgkernels.training.equilibrium``."""

    def __init__(self, report: list[Unsettled]) -> None:
        super().__init__(text(report))
        self.report = report


def text(report: list[Unsettled]) -> str:
    parts = []
    for phase, samples, residual in report:
        shown = ", ".join(f"{s} ({r:.2g})" for s, r in list(zip(samples, residual))[:8])
        parts.append(f"{phase}: {len(samples)} samples, by place (residual): {shown}{', ...' * (len(samples) > 8)}")
    what = "phases" if any(part.phase == "free" for part in report) else "nudges"
    return f"{what} did not settle: " + "; ".join(parts)


def nudge_names(betas: Sequence[complex]) -> list[str]:
    return [f"beta={b if abs(b.imag) > 1e-12 * abs(b) else b.real:.3g}" for b in betas]


def judged(values: Mapping[str, Tensor], residual: Tensor, phases: Sequence[str], limit: float) -> list[Unsettled]:
    """values: of all samples, whose entries must be finite. residual: (P, B), which must not exceed `limit`."""
    wrong = torch.stack([~v.flatten(1).isfinite().all(1) for v in values.values()]).any(0)
    if not bool(torch.cat((wrong.unsqueeze(0), ~(residual <= limit))).any()):  # the only look at the device
        return []
    report = []
    for phase, row in zip(phases, residual):
        samples = (~(row <= limit)).nonzero().flatten()
        if len(samples):
            report.append(Unsettled(phase, samples.tolist(), row[samples].tolist()))
    seen = {sample for part in report for sample in part.samples}
    return report + no_numbers([sample for sample in wrong.nonzero().flatten().tolist() if sample not in seen])


def no_numbers(samples: list[int]) -> list[Unsettled]:
    return [Unsettled("error", samples, [float("nan")] * len(samples))] if samples else []


def settled(report: list[Unsettled], samples: int) -> list[int]:
    """Of `samples` samples the places of those that no report names."""
    seen = {sample for part in report for sample in part.samples}
    return [sample for sample in range(samples) if sample not in seen]
