"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn, targets

_STATE = torch.tensor([1, 2, 3])
_LAW, _NORM = ("normal", 1.0, None), (2, 1e-5, True)

DOORS = {
    "replicated_cross_entropy": (randn(3, 5, 2, 4), randn(8, 7), randn(7), targets(3, 7), True),
    "replicated_nt_xent": (randn(3, 5, 2, 4), randn(3, 5, 2, 4), randn(8, 6), randn(6), 0.5),
    "replicated_tangent": (randn(3, 5, 2, 4), randn(3, 5, 2, 4), randn(3, 8), randn(3)),
    "replicated_cotangent": (randn(3, 5, 2, 4), randn(3, 5, 2), randn(3, 8), 4, torch.float32),
    "dual_norm": (randn(3, 5, 8), randn(3, 5, 8), randn(3, 5, 8), randn(3, 5, 8), _STATE, *_LAW, *_NORM),
    "activity_grad": (randn(3, 5, 8), randn(3, 5, 8), randn(3, 5, 4), randn(3, 5, 8), _STATE, *_LAW, *_NORM),
}

# What such a tensor sets by itself: see there.
FREE = {("replicated_cross_entropy", "x"): {"entry 1"}}
