"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn

_STATES = torch.tensor([[1, 2, 3]])
_LAW = ("sign", 1.0, None)

DOORS = {
    "perturbed_linear": (randn(3, 2, 40), randn(6, 40), randn(6), randn(3), None, _STATES, *_LAW),
    "perturbed_conv2d": (
        *(randn(3, 2, 4, 6, 7), randn(6, 2, 3, 3), randn(6), randn(3), None, _STATES, *_LAW),
        *([1, 2], [1, 0], [1, 1], 2),
    ),
    "perturbed_rows": (randn(6, 40), torch.tensor([[1, 5], [0, 2], [3, 3]]), randn(3), None, _STATES, *_LAW, False),
    "formula_update_": (randn(6, 40), randn(1), None, _STATES, *_LAW, 0.5),
}

# What such a tensor sets by itself: see there.
FREE = {
    ("perturbed_linear", "x"): {"entry 1"},
    ("perturbed_conv2d", "x"): {"entry 1", "entry 3", "entry 4"},
    ("perturbed_conv2d", "weight"): {"entry 2", "entry 3"},
    ("perturbed_rows", "weight"): {"entry 0", "entry 1"},
    ("perturbed_rows", "x"): {"entry 1"},
    ("formula_update_", "weight"): {"entry 0", "entry 1"},
}
