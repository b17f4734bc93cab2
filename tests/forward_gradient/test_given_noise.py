"""Noise that is given to `ForwardGradientTrainer.gradients`, and what else is refused by name."""

import pytest
import torch

import lgkernels.nn as lnn
from lgkernels.random import RandomFeedback
from tests.forward_gradient.test_trainer import assert_same, batch, model_of, trainer_of
from tests.support.problems import randn


def given(trainer):
    """The noise that a trainer would draw itself, as tensors."""
    patches, groups, width = 16, trainer.model.blocks[0].groups, trainer.model.blocks[0].channel.out_features
    made = []
    for b, block in enumerate(trainer.model.blocks):
        made.append([])
        for (kind, _), noise in zip(block.stages(), trainer._draw(b, None)):
            shape = (6, patches, groups, width // groups) if kind == "group" else (6, patches, width)
            is_formula = isinstance(noise, RandomFeedback)
            made[-1].append(noise.materialize(shape, dtype=torch.float64) if is_formula else noise)
    return made


@pytest.mark.parametrize("derivative", ["forward", "finite_difference"])
@pytest.mark.parametrize("estimator", ["LG-FG-A", "LG-FG-W", "FG-A", "FG-W"])
def test_given_noise_is_that_of_the_trainer_where_it_is_the_same(estimator, derivative):
    options = dict(law="sign", derivative=derivative)
    trainer = trainer_of(model_of(), estimator, **options)
    got = trainer.gradients(*batch(), noise=given(trainer))[1]
    assert_same(got, trainer_of(trainer.model, estimator, **options).gradients(*batch())[1])


def test_other_noise_is_refused_by_name():
    model, data = model_of(), batch()
    activities, weights = (given(trainer_of(model, name)) for name in ("FG-A", "FG-W"))
    cases = [
        ("BP", 1, activities, r"noise must be None for estimator='BP', which perturbs nothing, got a list"),
        ("LG-FG-A", 2, activities, r"noise must be None where a step takes draws=2.*trainer of draws=1"),
        ("LG-FG-A", 1, activities[0], r"noise must be a list or tuple of 3, one list for each block, got a list of 2"),
        (
            "LG-FG-A",
            1,
            [activities[0]] * 3,
            r"noise\[1\] must be a list or tuple of 3, one entry for each stage.* of 2",
        ),
        ("LG-FG-W", 1, activities, r"noise\[0\]\[0\] must be a list or tuple of 2, a pair of tensors.*got a Tensor"),
        ("LG-FG-A", 1, [[t[:5] for t in of] for of in activities], r"noise\[0\]\[0\] must have shape \(6, 16, 16\)"),
        (
            "FG-W",
            1,
            [[(w.t() if w.dim() == 2 else w, b) for w, b in of] for of in weights],
            r"\[0\]\[0\]\[0\] must have",
        ),
        ("FG-W", 1, [[(b, b) for _, b in of] for of in weights], r"noise\[0\]\[0\]\[0\] must have shape .*weight"),
    ]
    for estimator, draws, noise, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer_of(model, estimator, draws=draws).gradients(*data, noise=noise)
    for estimator, noise, message in (
        ("FG-A", [[None] * len(of) for of in activities], r"noise\[0\]\[0\] must be a torch.Tensor, got NoneType"),
        ("FG-A", [[t.float() for t in of] for of in activities], r"noise\[0\]\[0\] must be float64 if and only if the"),
    ):
        with pytest.raises(TypeError, match=message):
            trainer_of(model, estimator).gradients(*data, noise=noise)


@pytest.mark.parametrize("estimator", ["BP", "LG-BP", "FA", "DFA"])
def test_options_that_an_estimator_without_noise_would_ignore(estimator):
    for name, value in (("draws", 2), ("derivative", "finite_difference")):
        with pytest.raises(
            ValueError, match=f"{name} must be .* for estimator='{estimator}', which perturbs nothing, got"
        ):
            trainer_of(model_of(), estimator, **{name: value})


def test_patches_of_other_sizes_are_refused_by_name():
    model = lnn.LocalMixer("M/4/4", image_size=8, in_channels=1, width=16)
    assert model(randn(2, 16, 4)).shape == (2, 10)
    for shape in ((2, 16, 5), (2, 15, 4)):
        with pytest.raises(ValueError, match=r"x must have shape \(2, 16, 4\) \(the patches of N images"):
            model(randn(*shape))
    for shape in ((2, 16, 15), (2, 15, 16)):
        with pytest.raises(ValueError, match=r"x must have shape \(2, 16, 16\) \(\(N, P, in_features\)\), got"):
            model.blocks[1](randn(*shape))
