"""`feedback_projection`, `target_projection`, and RandomFeedback as a module, every backend."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from tests.feedback.common import LAWS, randn, random_feedback
from tests.support.cases import DTYPES
from tests.support.tolerances import assert_accurate, assert_relative

# -- projections --------------------------------------------------------------------------------------------------

SHAPES = ((12,), (3, 4, 5), (1,), (2, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feedback_projection(impl, shape, batch, dtype):
    error, matrix, random = randn(batch, 7, dtype=dtype), randn(7, *shape, seed=1), random_feedback("uniform")
    for given, dense in ((matrix, matrix), (matrix.flatten(1), matrix), (random, random.materialize((7, *shape)))):
        got = LF.feedback_projection(error, given, shape, impl=impl)
        rival = (error @ dense.flatten(1).to(dtype)).view(batch, *shape)
        assert_accurate("signal", got, rival, (error.double() @ dense.flatten(1).double()).view(batch, *shape), 7)
    assert not LF.feedback_projection(error.requires_grad_(), random, shape, impl=impl).requires_grad


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_given_matrix_needs_no_backend(name):
    error, matrix = randn(3, 4, dtype=torch.float64), randn(4, 5, dtype=torch.float64, seed=1)
    assert torch.equal(LF.feedback_projection(error, matrix, 5, impl=name), error @ matrix)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_projection_is_a_row(impl, shape, integers):
    target = torch.tensor([6, 0, 3, 3]).to(integers)
    matrix, random = randn(7, *shape, seed=1), random_feedback("uniform")
    for given, dense in ((matrix, matrix), (matrix.flatten(1), matrix), (random, random.materialize((7, *shape)))):
        assert torch.equal(LF.target_projection(target, given, shape, impl=impl), dense[target.long()])
    one_hot = F.one_hot(target.long(), 7).float()
    assert_relative(
        "one-hot",
        LF.target_projection(one_hot, random, shape, impl=impl),
        random.materialize((7, *shape))[target.long()],
        1e-6,
    )


def test_an_integer_is_a_shape(impl):
    assert LF.feedback_projection(randn(2, 7), random_feedback(), 5, impl=impl).shape == (2, 5)


@pytest.mark.parametrize("law", LAWS)
def test_projections_draw_row_by_class_and_column_by_neuron(impl, law):
    random = random_feedback(law)
    eye = LF.feedback_projection(torch.eye(7), random, (2, 9), impl=impl)
    assert_relative("signal", eye, random.materialize((7, 2, 9)), 1e-6)


def test_feedback_modules_copy_and_pickle(tmp_path):
    random = random_feedback()
    random.advance()
    twin = copy.deepcopy(random)
    twin.advance()
    assert random.state.tolist() == [5, 3, 1] and twin.state.tolist() == [5, 3, 2]
    torch.save(random, tmp_path / "random.pt")
    loaded = torch.load(tmp_path / "random.pt", weights_only=False)
    assert torch.equal(loaded.materialize((3, 4)), random.materialize((3, 4)))
