"""Pooling in several parts of the patches, which the interpreter's large tiles never need."""

import pytest

from lgkernels.ops.forward_gradient import reference, triton
from tests.support.problems import randn
from tests.support.tolerances import assert_accurate, assert_bit_equal


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("patches", [17, 32, 50])
def test_parts_add_up(patches, layer_norm, monkeypatch):
    sizes = {"BLOCK_P": 2, "BLOCK_G": 2 if layer_norm else 8, "BLOCK_C": 8 if layer_norm else 1, "num_warps": 1}
    for op in ("stream", "pool"):
        monkeypatch.setitem(triton.TILES, op, lambda *_: sizes)
    x = randn(2, patches, 3, 6)
    launched, launch = [], triton.launch

    def noted(*arguments, **constants):
        launched.append(arguments[8])
        launch(*arguments, **constants)

    monkeypatch.setattr(triton, "launch", noted)
    got = triton.pooled(x, layer_norm)
    assert launched == [-(-patches // 16), 1]
    expected, truth = (reference.pooled(t, layer_norm) for t in (x, x.double()))
    assert_accurate("pooled", got, expected, truth, patches)
    assert_bit_equal("pooled again", triton.pooled(x, layer_norm), got)
