"""A nan in the features or in sim_weight is no constant row: its gradient is nan, not 0."""

import pytest
import torch

import lgkernels.functional as LF


@pytest.mark.parametrize("shape", [(6, 4), (3, 8)], ids=["pairs of features", "pairs of rows"])
def test_nan_in_sim_weight(impl, shape):
    torch.manual_seed(0)
    h = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[1], shape[1])
    weight[0, 0] = float("nan")
    weight.requires_grad_()
    loss = LF.similarity_matching_loss(h, torch.arange(len(h)) % 3, weight, num_classes=3, impl=impl)
    loss.backward()
    assert loss.isnan() and weight.grad.isnan().all() and h.grad.isnan().all()


@pytest.mark.parametrize("shape", [(6, 4), (3, 8, 2, 2)], ids=["rows", "deviations"])
def test_not_finite_features(impl, shape):
    torch.manual_seed(0)
    h = torch.randn(shape)
    h[1].view(-1)[0] = float("inf")
    h.requires_grad_()
    loss = LF.similarity_matching_loss(h, torch.arange(len(h)) % 3, num_classes=3, impl=impl)
    loss.backward()
    assert loss.isnan() and h.grad.isnan().all()


def test_a_constant_row_still_counts_as_nothing(impl):
    h = torch.randn(6, 4)
    h[1] = 3.0
    h.requires_grad_()
    loss = LF.similarity_matching_loss(h, torch.arange(6) % 3, num_classes=3, impl=impl)
    loss.backward()
    assert loss.isfinite() and not h.grad[1].any() and h.grad.isfinite().all()
