"""The cases of tests/lls/test_loss.py on a CUDA device, and what only a device can show."""

import pytest
import torch

import lgkernels.functional as LF
from tests.lls.test_loss import test_layouts  # noqa: F401
from tests.support.gpu import backend, on_the_device  # noqa: F401
from tests.support.problems import targets
from tests.support.tolerances import assert_relative

pytestmark = pytest.mark.op("lls_loss")


@pytest.mark.alone
def test_loss_of_more_than_2_to_the_31_elements(impl):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    activation = torch.randn(8200, 64, 64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = targets(8200, 10).cuda()
    loss = LF.lls_loss(activation, target, num_classes=10, pool_size=2, reduction="none", impl=impl)
    loss.sum().backward()
    tail = activation.detach()[-3:].cpu().requires_grad_()
    exact = LF.lls_loss(tail, target[-3:].cpu(), num_classes=10, pool_size=2, reduction="none", impl="reference")
    exact.sum().backward()
    assert_relative("loss", loss[-3:].cpu(), exact, 1e-3)
    assert_relative("gradient", activation.grad[-3:].cpu(), tail.grad, 2e-2)


def test_class_out_of_range_with_the_debug_switch(impl, monkeypatch):
    monkeypatch.setenv("LGKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="target must hold class indices"):
        LF.lls_loss(
            torch.randn(2, 8, device="cuda"), torch.tensor([0, 9], device="cuda"), num_classes=5, pool_size=8, impl=impl
        )
