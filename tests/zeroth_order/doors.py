"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn

_STATES = torch.tensor([[1, 2, 3]])
_LAW = ("sign", 1.0, None)

DOORS = {
    "perturbed_linear": (randn(3, 2, 40), randn(6, 40), randn(6), randn(3), None, _STATES, *_LAW),
    "formula_update_": (randn(6, 40), randn(1), None, _STATES, *_LAW, 0.5),
}

# What such a tensor sets by itself: see there.
FREE = {("perturbed_linear", "x"): {"entry 1"}, ("formula_update_", "weight"): {"entry 0", "entry 1"}}
