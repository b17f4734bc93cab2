"""What a GPU has to show: lines that rows of the benches meet or miss, judged by bench/gpu_check.py's parts line:*."""

from collections.abc import Callable
from typing import NamedTuple

from . import report

HOOKS = "nn.Linear, AdamW(fused=True) in backward hooks"


class Line(NamedTuple):
    """`value` of a case's {provider: row} and our fastest row, at most `most`; for the cases that `holds` takes."""

    family: str
    op: str
    words: str
    holds: Callable[[dict], bool]
    value: Callable[[dict, dict], float]
    most: float


def _resident(row):
    """Bytes of weight, exp_avg and exp_avg_sq."""
    return 3 * row["channels"] * row["out_channels"] * (4 if row["dtype"] == "float32" else 2)


def _over_resident(rows, ours):
    """A row's peak is what a call holds beyond what lay there before it."""
    return 1 + ours["peak_bytes"] / _resident(ours)


def _of_hooks(rows, ours):
    return ours["median_ms"] / rows[HOOKS]["median_ms"]


LINES = (
    Line(
        *("zeroth_order", "zeroth_order_step", "time of two inference forwards at M >= 2048"),
        lambda row: row["batch"] >= 2048,
        lambda rows, ours: ours["median_ms"] / rows["two forwards"]["median_ms"],
        1.25,
    ),
    Line(
        *("fused_update", "fused_update_step", "AdamW: time of the optimizer in backward hooks"),
        lambda row: row["batch"] == 8,
        _of_hooks,
        1 / 1.3,
    ),
    Line(
        *("fused_update", "fused_update_step", "AdamW: peak of memory over weights and states"),
        lambda row: row["batch"] == 8,
        _over_resident,
        1.15,
    ),
)
FAMILIES = sorted({line.family for line in LINES})


def ours_of(rows):
    """Our fastest kernels' row of a case, of states in full precision; None where only plain torch took part."""
    found = [
        row
        for provider, row in rows.items()
        if row["role"] == "ours" and row["backend"] in ("triton", "cuda") and "8-bit" not in provider
    ]
    return min(found, key=lambda row: row["median_ms"], default=None)


def judged(family, rows, every=False):
    """[{"case", "line", "value", "most", "met"}] for the family's lines; `every`: of cases of any sizes."""
    found = []
    for line in LINES:
        of_line = [row for row in rows if row["op"] == line.op and (every or line.holds(row))]
        for case, named in report.cases(of_line).items() if line.family == family else ():
            ours = ours_of(named)
            value = None if ours is None else line.value(named, ours)
            met = value is not None and value <= line.most
            found.append({"case": case, "line": line.words, "value": value, "most": line.most, "met": met})
    return found


def words(found):
    """A line of text for each."""
    said = {True: "met", False: "MISSED"}
    return [
        f"{f['case']}: {f['line']}: "
        + ("no kernel took part" if f["value"] is None else f"{f['value']:.2f}, at most {f['most']:.2f}")
        + f": {said[f['met']]}"
        for f in found
    ]
