"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn

DOORS = {
    "direct_forward": (randn(3, 4, 6, 6), *(randn(4, seed=i).abs() for i in range(4)), 0.1, 1e-5, 0.01, True),
    "direct_backward_": (
        randn(3, 4, 6, 6),
        *(randn(4, seed=i).abs() for i in range(4)),
        None,
        randn(3, 5),
        torch.tensor([1, 2, 3]),
        "uniform",
        1.0,
        None,
        0.01,
        True,
    ),
}

# What such a tensor sets by itself: see there.
FREE = {
    ("direct_forward", "z"): {"entry 0", "entry 2", "entry 3"},
    ("direct_backward_", "z"): {"entry 2", "entry 3"},
    ("direct_backward_", "error"): {"entry 1"},
}
