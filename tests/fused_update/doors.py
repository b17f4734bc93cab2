"""Arguments that the family's op accepts: see integration/test_door.py."""

from tests.fused_update.common import STEPS
from tests.support.problems import randn

_MATRICES = (randn(6, 40), randn(6, 40), randn(6, 40).abs(), randn(6, 40), randn(3, 6), randn(3, 40))
DOORS = {"fused_update_": (*_MATRICES, *STEPS["adamw"])}
