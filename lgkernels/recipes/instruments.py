"""Measures of layers over the epochs. FA's weights turn towards the feedback, sign-symmetry starts there."""

import math

from torch import nn

from .. import nn as lnn

PLOTS = {"alignment.png": {"alignment": "angle of weight and feedback (°)", "weight_ratio": "|feedback| / |weight|"}}


def of(blocks):
    """Both measures of every converted layer, for an epoch's record: name -> layer -> value (None where undefined)."""
    model = nn.Sequential(*blocks)
    measured = {"alignment": lnn.alignment(model), "weight_ratio": lnn.weight_ratio(model)}
    return {
        name: {layer: value if math.isfinite(value) else None for layer, value in values.items()}
        for name, values in measured.items()
    }
