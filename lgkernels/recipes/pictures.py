"""The pictures of a run: one colour a rule, the same in all of them, and legends beside the plots."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import checkpoint

Histories = Mapping[str, list[dict[str, Any]]]  # rule -> the records of its epochs
PANEL = 4.2, 3.4  # width and height in inches


def colours(rules: Iterable[str]) -> dict[str, Any]:
    """Rule -> its colour. Back-propagation, what all are compared with, is black."""
    from matplotlib import colormaps

    others = [rule for rule in rules if rule != "bp"]
    table = colormaps["tab10" if len(others) <= 10 else "tab20"]
    return {"bp": "black", **{rule: table(i % table.N) for i, rule in enumerate(others)}}


def _figure(columns: int, rows: int, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * PANEL[0] + 2, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    checkpoint.write_atomically(path, file.getvalue())


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def curves(path: Path, title: str, histories: Histories, colour: Mapping[str, Any]) -> None:
    """Test accuracy, training accuracy and the classifier's training loss over the epochs, a panel each."""
    panels = {
        "test accuracy (%)": lambda record: 100 * record["test_accuracy"],
        "training accuracy (%)": lambda record: 100 * record["train_accuracy"],
        "training loss of the classifier": lambda record: _number(record["losses"][-1]),
    }
    figure, axes = _figure(3, 1, PANEL[1] + 0.12 * len(histories))
    for panel, (label, value) in zip(axes[0], panels.items()):
        for rule, history in histories.items():
            epochs = [record["epoch"] for record in history]
            panel.plot(epochs, list(map(value, history)), color=colour[rule], marker=".", label=rule)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    axes[0][2].set_yscale("log")
    figure.suptitle(title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", title="rule")
    _save(figure, path)


def layers(path: Path, title: str, histories: Histories, labels: Mapping[str, str], colour: Mapping[str, Any]) -> bool:
    """Measures of layers over the epochs, a row of panels a rule, from the first layer (dark) to the last (light);
    False if no rule has any. labels: key of an epoch's record -> the axis."""
    from matplotlib import colormaps

    histories = {rule: history for rule, history in histories.items() if history and labels.keys() & history[0].keys()}
    if not histories:
        return False
    count = max(len(history[0].get(name, ())) for history in histories.values() for name in labels)
    figure, axes = _figure(len(labels), len(histories), max(PANEL[1], 0.25 * count + 1.2))
    for (rule, history), row in zip(histories.items(), axes):
        epochs = [record["epoch"] for record in history]
        for panel, (name, label) in zip(row, labels.items()):
            names = list(history[0].get(name, ()))
            for i, layer in enumerate(names):
                values = [_number(record[name][layer]) for record in history]
                shade = colormaps["viridis"](0.9 * i / max(len(names) - 1, 1))
                panel.plot(epochs, values, color=shade, marker=".", label=layer)
            panel.set(xlabel="epoch", ylabel=label)
            panel.set_title(rule, color=colour[rule], fontweight="bold")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        row[-1].legend(title="layer", fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(title)
    _save(figure, path)
    return True
