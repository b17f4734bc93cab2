"""The kernels on a CUDA device: against the reference on the CPU, and the step's bits."""

import pytest
import torch

from lgkernels.ops.zeroth_order.options import Geometry, Noise
from tests.conftest import backend_module
from tests.support import problems
from tests.support.gpu import backend, on_the_device, test_no_kernel_is_at_fault  # noqa: F401
from tests.support.problems import randn
from tests.support.tolerances import assert_bit_equal, assert_relative
from tests.zeroth_order.test_functions import EXACT, LAWS

pytestmark = pytest.mark.op("perturbed_linear", "perturbed_conv2d", "perturbed_rows", "formula_update_")


def noise_of(law, matrices, device):
    states = torch.tensor([[5, 3, step] for step in range(matrices)], device=device)
    return Noise(None, states, law, LAWS[law].get("scale", 1.0), LAWS[law].get("low"))


@pytest.fixture
def pair(backend):
    return backend_module("zeroth_order", backend), backend_module("zeroth_order", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1, 8, 40, 200])
@pytest.mark.parametrize("law", LAWS)
def test_perturbed_linear(pair, law, rows, dtype):
    x, weight, c = randn(2, rows, 300).to(dtype), randn(65, 300, seed=1).to(dtype), torch.tensor([0.3, -0.3])
    truth = pair[1].perturbed_linear(x.double(), weight.double(), None, c.double(), noise_of(law, 1, "cpu"))
    there = [t.to(problems.DEVICE) for t in (x, weight)]
    y = pair[0].perturbed_linear(*there, None, c.to(problems.DEVICE), noise_of(law, 1, problems.DEVICE))
    assert_relative("y", y.cpu(), truth, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("law", EXACT)
def test_the_step_has_the_bits_of_the_reference(pair, law, dtype):
    weight, c = randn(65, 300).to(dtype), torch.tensor([0.3, -0.7, 0.01])
    there = weight.to(problems.DEVICE, copy=True)
    pair[0].formula_update_(there, c.to(problems.DEVICE), noise_of(law, 3, problems.DEVICE), 0.75)
    pair[1].formula_update_(weight, c, noise_of(law, 3, "cpu"), 0.75)
    assert_bit_equal("weight", there.cpu(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_perturbed_conv2d(pair, groups, matrices, dtype):
    x, weight = randn(2, 3, 8, 9, 9).to(dtype), randn(20, 8 // groups, 3, 3, seed=1).to(dtype)
    geometry, c = Geometry([1, 2], [1, 0], [1, 1], groups), torch.tensor([0.3, -0.3])
    wide = x.double(), weight.double(), None, c.double()
    truth = pair[1].perturbed_conv2d(*wide, noise_of("sign", matrices, "cpu"), geometry)
    there = [t.to(problems.DEVICE) for t in (x, weight)]
    noise = noise_of("sign", matrices, problems.DEVICE)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = pair[0].perturbed_conv2d(*there, None, c.to(problems.DEVICE), noise, geometry)
    assert_relative("y", y.cpu(), truth, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("law", LAWS)
def test_perturbed_rows(pair, law, dtype):
    weight, c = randn(65, 300).to(dtype), torch.tensor([0.3, -0.3])
    x = torch.tensor([[0, 64, 3, 3, 17], [1, 2, 63, 0, 5]])
    truth = pair[1].perturbed_rows(weight.double(), x, c.double(), noise_of(law, 2, "cpu"), torch.float64)
    there = [t.to(problems.DEVICE) for t in (weight, x, c)]
    y = pair[0].perturbed_rows(*there, noise_of(law, 2, problems.DEVICE), dtype)
    assert_relative("y", y.cpu(), truth, 1e-5 if dtype == torch.float32 else 1e-2)


def test_rows_that_are_not_there_are_nan(pair):
    """Nothing is read there."""
    weight, x = randn(5, 40).to(problems.DEVICE), torch.tensor([[0, 5, -1, 2**40]], device=problems.DEVICE)
    y = pair[0].perturbed_rows(weight, x, torch.ones(1).to(weight), noise_of("sign", 1, problems.DEVICE), torch.float32)
    assert y[0, 0].isfinite().all() and y[0, 1:].isnan().all()
