"""What a run leaves behind: metrics.jsonl, curves.png, results.json, and the table on the screen."""

import json

from . import checkpoint, rules
from .rules import Column


def append_metrics(folder, record):
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def rewrite_metrics(folder, histories):
    """On a resume: exactly the epochs that the checkpoints hold."""
    lines = "".join(json.dumps(record) + "\n" for history in histories for record in history)
    checkpoint.write_atomically(folder / "metrics.jsonl", lines.encode())


def write_json(path, content):
    checkpoint.write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _quantity(value):
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _mebibytes(value):
    return f"{value / 2**20:.1f} MiB"


_COLUMNS = (
    Column("test accuracy", "test_accuracy", lambda v: f"{100 * v:.2f} %"),
    Column("ms/step", "ms_per_step", lambda v: f"{v:.1f}"),
    Column("samples/s", "samples_per_second", lambda v: f"{v:.0f}"),
    Column(
        "step memory",
        "peak_step_bytes",
        _mebibytes,
        "step memory: most that one step holds beyond parameters, optimizer state and input",
    ),
    Column("state", "state_bytes", _mebibytes, "state: parameters, buffers, optimizer state and offsets"),
    Column(
        "signal MACs/sample",
        "signal_macs",
        _quantity,
        "signal MACs: what carries the error to the layers, weight gradients not counted",
    ),
)
_LAST = Column("training", "train_seconds", lambda v: f"{v:.0f} s")


def _shown(results):
    """The columns that any of the rules has a figure for, those of the rules' own measures too."""
    own = [column for rule in results for column in rules.get(rule).measures.columns]
    return [c for c in dict.fromkeys((*_COLUMNS, *own, _LAST)) if any(c.key in figures for figures in results.values())]


def table(results):
    """Lines of the final table; `results`: rule -> figures of results.json."""
    columns = _shown(results)
    head = ("rule", *(column.title for column in columns))
    rows = [(rule, *(c.text(r[c.key]) if c.key in r else "" for c in columns)) for rule, r in results.items()]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (head, *rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(results):
    """What the table's columns mean."""
    return [column.note for column in _shown(results) if column.note]
