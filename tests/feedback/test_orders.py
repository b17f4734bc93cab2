"""Every feedback kernel gives the same bits whatever the order of threads and blocks.

That the bits are right (all rules, dtypes, layouts, sizes) is tested in test_kernels.py, on the backend "cuda-simt".
"""

import numpy as np
import pytest
import torch

from lgkernels.ops.feedback import reference
from tests.feedback.common import made, randn, weights
from tests.simt import executor
from tests.simt.orders import in_every_order
from tests.support.tolerances import assert_accurate

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
STATE = torch.tensor([123456789012345, 7, 3])
CPU = torch.device("cpu")
LAWS = [("uniform", 0.7, None), ("uniform8", 0.7, 0.0), ("sign", 0.3, None), ("normal", 0.5, None)]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law[0])
def test_matrix_and_rows(law):
    """Lanes share the Philox calls of a tile through shared memory."""
    random, index = (STATE, *law), torch.tensor([5, 0, 2**32 - 1, 5, 9])
    weight = weights(37, 300)
    in_every_order(
        "feedback", lambda kernels: kernels.matrix((37, 300), made(weight, None, random, 0.7), torch.bfloat16, CPU)
    )
    in_every_order("feedback", lambda kernels: kernels.rows(index, 300, made(random=random, scale=0.7), torch.float32))


def test_pack_signs():
    in_every_order("feedback", lambda kernels: kernels.pack_signs(weights(37, 300)))


# one case a division of the work: warps along the rows, along the columns, both; several splits, several blocks along
# M, a half-empty last tile
PRODUCTS = [(5, 300, 130), (9, 10, 2100), (3, 70, 700), (8, 700, 40), (20, 33, 129), (1, 1, 1)]


@pytest.mark.parametrize("law", [None, *LAWS], ids=lambda law: law and law[0])
@pytest.mark.parametrize("m, n, k", PRODUCTS)
def test_product(m, n, k, law):
    grad, random = randn(m, n, seed=1), None if law is None else (STATE, *law)
    weight = reference.pack_signs(weights(n, k)) if law is None else weights(n, k)
    arguments = (grad, k, made(weight, None, random, 0.7, law is None))
    (got,) = in_every_order("feedback", lambda kernels: kernels.product_in_registers(*arguments))
    truth = reference.product(grad.double(), *arguments[1:])
    assert_accurate("product", got, reference.product(*arguments), truth, n)


def test_product_with_several_chunks():
    """So many blocks that no split is needed: a block has more rows than the 256 whose grad fits its shared memory."""
    grad, weight = randn(8192, 261, seed=1), weights(261, 1)
    (got,) = in_every_order("feedback", lambda kernels: kernels.product_in_registers(grad, 1, made(weight)))
    assert_accurate("product", got, grad @ weight.sign(), grad.double() @ weight.sign().double(), 261)


def test_normal_values_over_many_angles():
    """The kernels have a sine and cosine of their own."""
    random = (STATE, "normal", 1.0, None)
    got = executor.backend("feedback").matrix((256, 2048), made(random=random), torch.float32, CPU)
    expected = reference.matrix((256, 2048), made(random=random), torch.float32, CPU)
    np.testing.assert_array_max_ulp(got.numpy(), expected.numpy(), maxulp=4)
