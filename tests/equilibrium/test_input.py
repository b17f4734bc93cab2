"""The product of a dense net's input, which its settling begins with."""

import pytest
import torch

from lgkernels.ops.equilibrium.autograd import _product


@pytest.mark.parametrize("strided", [False, True])
def test_the_product_of_the_input(strided):
    """Large enough for oneDNN's; with a gradient it is the library's."""
    made = torch.Generator().manual_seed(0)
    x, w = torch.rand(40, 784, generator=made), torch.randn(784, 64, generator=made)
    if strided:
        x, w = x.t().contiguous().t(), w.repeat_interleave(2, 1)[:, ::2]
    truth = x.double() @ w.double()
    with torch.no_grad():
        torch.testing.assert_close(_product(x, w).double(), truth, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(_product(x[:3], w).double(), truth[:3], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(_product(x.double(), w.double()), truth)
    leaf = w.clone().requires_grad_()
    _product(x, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum(0).unsqueeze(1).expand_as(w))
