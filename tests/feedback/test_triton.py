"""What only the Triton backend of feedback does: its choice of kernels by shape, its rounding under the interpreter."""

import pytest
import torch

from lgkernels.core.dispatch import interpreting
from lgkernels.ops.common import launch
from lgkernels.ops.feedback import reference
from tests.conftest import running
from tests.feedback.common import made, randn, weights
from tests.support.tolerances import assert_accurate, assert_bit_equal

pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernels run on CPU tensors: set TRITON_INTERPRET=1")
RANDOM = (torch.tensor([5, 6, 7]), "uniform8", 0.7, None)


@pytest.fixture
def triton():
    with running("triton"):
        from lgkernels.ops.feedback import triton

        yield triton


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels in the order of their launches."""
    names, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, *rest: (names.append(kernel.fn.__name__), start(kernel, *rest)))
    return names


@pytest.mark.parametrize(
    "shape, kernels",
    [
        ((8, 64, 40), ["product_kernel"]),  # F in registers
        ((2, 1100, 9), ["product_kernel", "sum_slices_kernel"]),  # few programs: they share the sum
        ((129, 65, 33), ["product_kernel"]),  # DFA: F is smaller than the output
        ((129, 129, 33), ["matrix_kernel"]),  # F once, then the library's product
        ((0, 200, 9), []),
        ((200, 200, 0), []),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("random", [None, RANDOM], ids=["one", "uniform8"])
def test_product_chooses_by_shape(triton, launched, shape, kernels, dtype, random):
    m, n, k = shape
    grad, weight = randn(m, n, seed=1, dtype=dtype), weights(n, k)
    got = triton.product(grad, k, made(weight, None, random, 0.3))
    assert launched == kernels
    same = reference.product(grad, k, made(weight, None, random, 0.3))
    assert_accurate("product", got, same, reference.product(grad.double(), k, made(weight, None, random, 0.3)), n)


def test_packed_signs_where_the_library_multiplies(triton, launched):
    grad, weight = randn(130, 140, seed=1), weights(140, 70)
    got = triton.product(grad, 70, made(reference.pack_signs(weight), None, None, 0.3, True))
    assert launched == ["matrix_kernel"]
    assert_accurate(
        "product",
        got,
        *(reference.product(g, 70, made(weight, None, None, 0.3, True)) for g in (grad, grad.double())),
        140,
    )


def test_bfloat16_is_rounded_to_nearest(triton):
    """Bit for bit as torch rounds, which is how a GPU rounds: the interpreter alone would drop the low bits."""
    magnitude = randn(9, 300, seed=3) * torch.logspace(-32, 36, 300)  # the interpreter has its own denormals
    magnitude[0, :5] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38])
    for weight, value, random in ((None, magnitude, None), (weights(9, 300), None, RANDOM)):
        arguments = (9, 300), made(weight, value, random), torch.bfloat16, torch.device("cpu")
        assert_bit_equal("matrix", triton.matrix(*arguments), reference.matrix(*arguments))
    index = torch.tensor([3, 0, 3])
    assert_bit_equal(
        "rows",
        triton.rows(index, 65, made(random=RANDOM, scale=0.5), torch.bfloat16),
        reference.rows(index, 65, made(random=RANDOM, scale=0.5), torch.bfloat16),
    )
