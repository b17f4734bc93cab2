"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from lgkernels.ops.lls.options import BlockOptions, HeadOptions
from tests.support.problems import randn, targets

_BLOCK = BlockOptions("square", [1, 1], [1, 1], 0.1, 1e-5, 0.01, False, 5, 2, 0.5, 0.0)

DOORS = {
    "lls_loss_forward": (
        randn(3, 4, 6, 6),
        targets(3, 5),
        randn(7, 5),
        randn(7, 16),
        "square",
        2,
        *HeadOptions(5),
        True,
    ),
    "lls_loss_backward": (
        torch.ones(3),
        randn(3, 16),
        randn(3, 5),
        randn(3, 5),
        [3, 4, 6, 6],
        torch.float32,
        False,
        2,
        True,
        True,
        True,
    ),
    "lls_block": (
        randn(3, 2, 6, 6),
        randn(4, 2, 3, 3),
        randn(4),
        randn(4),
        randn(4),
        randn(4),
        randn(4).abs(),
        targets(3, 5),
        randn(5),
        *_BLOCK,
        True,
        True,
        True,
    ),
}

# What such a tensor sets by itself: see there.
FREE = {
    ("lls_loss_forward", "activation"): {"entry 2", "entry 3"},
    ("lls_loss_backward", "grad_loss"): {"one less"},  # a single number
    ("lls_block", "x"): {"entry 2", "entry 3"},
    ("lls_block", "weight"): {"entry 2", "entry 3"},
    ("lls_block", "modulation"): {"one before"},  # a matrix of one row
}
