"""What is not finite in an activation stays so in the loss and the gradient, wherever it stands."""

import pytest
import torch

import lgkernels.functional as LF


@pytest.mark.parametrize("normalize, value", [(True, float("inf")), (True, float("nan")), (False, -float("inf"))])
def test_not_finite(impl, normalize, value):
    """Column 0 of the basis is zero: there, too, zero times inf is nan, for one sample and within four."""
    torch.manual_seed(0)
    x = torch.randn(5, 40)
    x[0, 0] = x[4, 0] = value
    x.requires_grad_()
    loss = LF.lls_loss(
        x, torch.arange(5) % 3, num_classes=3, pool_size=40, normalize=normalize, reduction="none", impl=impl
    )
    loss.sum().backward()
    assert not loss[[0, 4]].isfinite().any() and loss[1:4].isfinite().all()
    assert not x.grad[[0, 4]].isfinite().any() and x.grad[1:4].isfinite().all()
