"""Measures of layers over the epochs. FA's weights turn towards the feedback, sign-symmetry starts there."""

import io
import math

from torch import nn

from .. import nn as lnn
from . import checkpoint

PLOTS = {
    "alignment.png": {
        "alignment": "angle between weight and feedback (degrees)",
        "weight_ratio": "|feedback| / |weight|",
    }
}


def of(blocks):
    """Both measures of every converted layer, for an epoch's record: name -> layer -> value (None where undefined)."""
    model = nn.Sequential(*blocks)
    measured = {"alignment": lnn.alignment(model), "weight_ratio": lnn.weight_ratio(model)}
    return {
        name: {layer: value if math.isfinite(value) else None for layer, value in values.items()}
        for name, values in measured.items()
    }


def draw(path, title, histories, labels):
    """Measures over epochs, a line a layer, a row of plots a rule; False if no rule has any.

    labels: key of an epoch's record -> the axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    histories = {rule: history for rule, history in histories.items() if history and labels.keys() & history[0].keys()}
    if not histories:
        return False
    figure = Figure(figsize=(10, 3.2 * len(histories)), layout="constrained")
    FigureCanvasAgg(figure)
    for (rule, history), row in zip(histories.items(), figure.subplots(len(histories), len(labels), squeeze=False)):
        epochs = [record["epoch"] for record in history]
        for axes, (name, label) in zip(row, labels.items()):
            for layer in history[0].get(name, ()):
                values = [record[name][layer] for record in history]
                axes.plot(epochs, [float("nan") if v is None else v for v in values], marker=".", label=layer)
            axes.set(xlabel="epoch", ylabel=label, title=f"{rule}: {title}")
            axes.grid(alpha=0.3)
        row[0].legend(title="layer", fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    checkpoint.write_atomically(path, file.getvalue())
    return True
