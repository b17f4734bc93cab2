"""What the functions take besides plain numbers and ordinary tensors."""

import numpy as np
import pytest
import torch

import lgkernels.functional as LF


def small_net():
    made = torch.Generator().manual_seed(0)
    sizes = {"in-h": (3, 4), "h-out": (4, 2), "out-h": (2, 4)}
    weights = {f"{edge}/kernel": torch.randn(*size, generator=made) / 4 for edge, size in sizes.items()}
    return dict(weights=weights, x=torch.rand(4, 3, generator=made))


@pytest.mark.parametrize("beta", [np.complex64(0.25 + 0.5j), np.complex128(0.25 + 0.5j)])
def test_a_complex_number_of_another_kind(beta):
    options = dict(**small_net(), steps=5, target=torch.arange(4) % 2)
    expected = LF.ep_settle(**options, beta=0.25 + 0.5j)
    for layer, u in LF.ep_settle(**options, beta=beta).items():
        assert u.is_complex() and torch.equal(u, expected[layer])
    with pytest.raises(ValueError, match="beta must be finite"):
        LF.ep_settle(**options, beta=beta * float("nan"))
    with pytest.raises(
        TypeError, match=r"beta must be a number, real or complex, got a tensor of .*: take the .item\(\)"
    ):
        LF.ep_settle(**options, beta=torch.tensor(beta))


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_through_time_of_tensors_made_in_inference_mode(inside):
    options, target = small_net(), torch.arange(4) % 2
    expected = LF.bptt_gradients(**options, target=target, state=LF.ep_settle(**options, steps=5), steps=3)
    assert all(g.any() for g in expected.values())
    with torch.inference_mode():
        made = small_net()
        made["state"] = LF.ep_settle(**made, steps=5)
        made["target"] = target.clone()
    with torch.inference_mode(inside):
        got = LF.bptt_gradients(**made, steps=3)
    for key, g in got.items():
        assert torch.equal(g, expected[key])
