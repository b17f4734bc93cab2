"""Arguments that the family's ops accept: see integration/test_door.py."""

import torch

from tests.fused_update.common import STEPS
from tests.support.problems import randn

_MATRICES = (randn(6, 40), randn(6, 40), randn(6, 40).abs(), randn(6, 40), randn(3, 6), randn(3, 40))
_CODES, _ABSMAX = torch.full((6, 40), 200, dtype=torch.uint8), torch.ones(6, 1)
DOORS = {
    "fused_update_": (*_MATRICES, *STEPS["adamw"]),
    "fused_update_8bit_": (
        *(randn(6, 40), _CODES, _ABSMAX, _CODES.clone(), _ABSMAX.clone()),
        *(None, *_MATRICES[4:]),
        *STEPS["adamw"],
    ),
}
