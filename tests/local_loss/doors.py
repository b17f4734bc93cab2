"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn, targets

DOORS = {
    "local_cross_entropy": (randn(3, 4, 5, 5), randn(7, 4), randn(7), targets(3, 7), 0.1, "mean", True),
    "local_cross_entropy_backward": (
        torch.ones(3),
        randn(3, 4),
        randn(3, 7),
        randn(3, 4),
        torch.float32,
        True,
        True,
        True,
    ),
    "goodness": (randn(3, 4, 5, 5), torch.tensor([True, False, True]), 2.0, True, True),
    "goodness_backward": (randn(3, 4, 5, 5), randn(3), torch.tensor(1.0)),
    "similarity": (randn(3, 4, 5, 5), targets(3, 7), 7, True, True),
    "similarity_backward": (randn(3, 4, 5, 5), randn(3, 4), randn(3, 4), torch.tensor(1.0)),
}

# What such a tensor sets by itself: see there.
FREE = {
    ("local_cross_entropy", "h"): {"entry 2", "entry 3"},
    ("local_cross_entropy_backward", "scale"): {"one less"},  # a single number
    ("local_cross_entropy_backward", "grad_logits"): {"entry 1"},
    ("goodness", "h"): {"entry 1", "entry 2", "entry 3", "one behind"},
    ("goodness_backward", "h"): {"entry 1", "entry 2", "entry 3", "one behind"},
    ("similarity", "x"): {"entry 1", "entry 2", "entry 3", "one behind"},
    ("similarity_backward", "x"): {"entry 2", "entry 3"},
}
