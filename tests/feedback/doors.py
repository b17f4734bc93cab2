"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.support.problems import randn

_STATE = torch.tensor([1, 2, 3])

DOORS = {
    "feedback_product": (randn(3, 6), 40, randn(6, 40), None, _STATE, "uniform", 1.0, None, 1.0, False),
    "feedback_rows": (torch.tensor([1, 0]), 40, _STATE, "uniform", 1.0, None, 1.0, torch.float32),
    "feedback_fold": (randn(2 * 12, 5 * 6), [2, 5, 5, 9], [2, 3], [3, 4], [2, 2], [1, 0], [1, 1]),
    "feedback_pack_signs": (randn(6, 40),),
    "feedback_matrix": (
        6,
        40,
        randn(6, 40),
        randn(6, 40),
        None,
        "uniform",
        1.0,
        None,
        1.0,
        False,
        torch.float32,
        torch.device("cpu"),
    ),
}

# What such a tensor sets by itself: see there.
FREE = {
    ("feedback_product", "grad"): {"entry 0"},
    ("feedback_rows", "index"): {"entry 0"},
    ("feedback_pack_signs", "weight"): {"entry 0", "entry 1"},
}
