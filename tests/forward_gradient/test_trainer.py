"""ForwardGradientTrainer: what the estimators have in common, and what tells them apart."""

import copy

import pytest
import torch
import torch.nn.functional as F

import lgkernels.nn as lnn
from bench.timing import peak_memory
from lgkernels.training import ForwardGradientTrainer, perturbation
from lgkernels.training.forward_gradient import ESTIMATORS
from tests.forward_gradient.common import STEPS, load, network

SMALL = dict(image_size=8, in_channels=3, num_classes=5, blocks=3, width=16)


def model_of(config="M/4/4", dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = lnn.LocalMixer(config, dtype=dtype, **{**SMALL, **options})
    with torch.no_grad():
        model.readout.weight.normal_(0, 0.3)
    return model


def batch(count=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(count) % 5


def trainer_of(model, estimator, **options):
    return ForwardGradientTrainer(model, lambda p: torch.optim.SGD(p, 0.1), estimator=estimator, **options)


def gradients(estimator, model=None, data=None, **options):
    return trainer_of(model or model_of(), estimator, **options).gradients(*(data or batch()))


def assert_same(one, other, tolerance=1e-12):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


# -- exact estimators -------------------------------------------------------------------------------------------------


def test_bp_is_autograd():
    model, (x, target) = model_of(), batch()
    _, ours = gradients("BP", model, readout_factor=1.0)
    F.cross_entropy(model(x), target).backward()
    assert_same(ours, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_local_losses_reach_earlier_blocks_only_where_not_greedy():
    _, local = gradients("L-BP")
    _, greedy = gradients("LG-BP")
    last = [n for n in local if n.startswith("blocks.2")]
    assert_same({n: local[n] for n in last}, {n: greedy[n] for n in last})
    assert not torch.allclose(local["blocks.0.channel.weight"], greedy["blocks.0.channel.weight"])


@pytest.mark.parametrize("estimator, exact", [("FA", "BP"), ("L-FA", "L-BP"), ("LG-FA", "LG-BP")])
def test_feedback_alignment_is_exact_with_the_weights_themselves(estimator, exact):
    """With random matrices equal to the weights it is back-propagation; with others it is not."""
    model = model_of()
    trainer = trainer_of(model, estimator)
    stages = [module for block in model.blocks for _, module in block.stages()]
    heads = [*(block.head for block in model.blocks), model.readout]
    different = trainer.gradients(*batch())[1]

    class Given(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def materialize(self, shape, device, dtype):
            return self.weight.detach()

    trainer.noise.backward_weight = torch.nn.ModuleList(Given(m.weight) for m in stages)
    trainer.noise.backward_head = torch.nn.ModuleList(Given(m.weight) for m in heads)
    same = trainer.gradients(*batch())[1]
    expected = gradients(exact, model)[1]
    assert_same(same, expected)
    assert not torch.allclose(different["blocks.0.channel.weight"], expected["blocks.0.channel.weight"])


def test_dfa_projects_the_error_of_the_readout():
    model, (x, target) = model_of(), batch()
    trainer = trainer_of(model, "DFA")
    _, got = trainer.gradients(x, target)
    block, patches = model.blocks[0], model.patches(x)
    error = (torch.softmax(model(x), 1) - F.one_hot(target, 5)).detach() / len(x)
    y = F.relu(F.layer_norm(block.channel(F.layer_norm(patches, (12,))), (16,)))
    signal = error @ trainer.noise.direct[0].materialize((5, 16 * 16), dtype=torch.float64)
    (expected,) = torch.autograd.grad(y, block.channel.weight, signal.view(y.shape))
    torch.testing.assert_close(got["blocks.0.channel.weight"], expected)
    assert not any("head" in name for name in got)  # they have no loss


# -- forward gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["normal", "sign"])
def test_mean_of_many_draws_is_the_local_gradient(law):
    """20,000 draws on the authors' tiny network: a batch of copies has noise of its own for each copy."""
    data = load(STEPS[0])
    model, copies, calls = network(data, torch.float64), 200, 100
    x, target = data["x"].double().repeat(copies, 1, 1), data["labels"].long().repeat(copies)
    trainer = trainer_of(model, "LG-FG-A", law=law)
    draws = [trainer.gradients(x, target)[1] for _ in range(calls)]
    exact = trainer_of(model, "LG-BP").gradients(data["x"].double(), data["labels"])[1]
    for name, expected in exact.items():
        sample = torch.stack([draw[name] for draw in draws])
        error, deviation = sample.mean(0) - expected, sample.std(0) / calls**0.5
        if "head" in name or "readout" in name:
            torch.testing.assert_close(sample[0], expected)
            continue
        if deviation.max() <= 1e-12:
            continue  # its gradient is 0 in theory
        ratio = (error.square().mean() / deviation.square().mean()).sqrt()
        assert ratio < 1.6, f"{name}: {ratio:.2f} standard errors"


@pytest.mark.parametrize("estimator, exact", [("FG-A", "BP"), ("FG-W", "BP"), ("LG-FG-W", "LG-BP")])
@pytest.mark.parametrize("derivative", ["forward", "finite_difference"])
def test_other_estimators_are_unbiased(estimator, exact, derivative):
    """Along the exact gradient: E <g, G> = |G|^2 for every block's parameters together."""
    model, data = model_of("M/2/2", width=8, blocks=2), batch(4)
    truth = gradients(exact, model, data)[1]
    trainer = trainer_of(model, estimator, derivative=derivative, step_size=1e-4)
    names = [n for n in truth if "head" not in n and "readout" not in n]
    draws = [trainer.gradients(*data)[1] for _ in range(100)]
    size = sum(truth[n].square().sum() for n in names)
    along = torch.stack([sum((d[n] * truth[n]).sum() for n in names) / size for d in draws])
    assert abs(along.mean() - 1) < 4 * along.std() / len(draws) ** 0.5
    assert along.std() < 6


def test_weight_perturbation_takes_the_derivative_along_its_noise():
    """FG-W's one number is the product of the exact gradient with the noise."""
    model, data = model_of("M/2/2", width=8, blocks=2), batch(4)
    noise = [trainer_of(model, "FG-W")._draw(b, None) for b in range(2)]
    _, got = trainer_of(model, "FG-W").gradients(*data, noise=noise)
    exact, along, names = gradients("BP", model, data)[1], 0.0, {p: n for n, p in model.named_parameters()}
    for block, given in zip(model.blocks, noise):
        for (_, module), (weight, bias) in zip(block.stages(), given):
            along += (exact[names[module.weight]] * weight).sum() + (exact[names[module.bias]] * bias).sum()
    for block, given in zip(model.blocks, noise):
        for (_, module), (weight, bias) in zip(block.stages(), given):
            torch.testing.assert_close(got[names[module.weight]], weight * along)
            torch.testing.assert_close(got[names[module.bias]], bias * along)


def test_one_block_one_patch_one_group_makes_local_and_global_the_same():
    """S/1/1: the block's loss and the last loss are of one value where the heads are the same."""
    model = model_of("S/1/1", image_size=8, blocks=1, width=16)
    with torch.no_grad():
        model.blocks[0].head.weight.copy_(model.readout.weight)
    for kind in "AW":
        _, local = gradients(f"LG-FG-{kind}", model)
        _, whole = gradients(f"FG-{kind}", model)
        assert_same({n: g for n, g in local.items() if "head" not in n}, whole)


@pytest.mark.parametrize("derivative", ["forward", "finite_difference"])
def test_a_step_takes_two_views(derivative):
    model, (x, target) = model_of(head="contrastive"), batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, "LG-FG-A", derivative=derivative)
    expected = trainer_of(model, "LG-FG-A", derivative=derivative).gradients((x, x.flip(3)), target)[1]
    assert len(trainer.step((x, x.flip(3)), target)) == 4
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * expected[name], msg=name)


def test_several_draws_are_a_mean():
    model = model_of()
    one = trainer_of(model, "LG-FG-A")
    first, second = (one.gradients(*batch())[1] for _ in range(2))
    both = gradients("LG-FG-A", model, draws=2)[1]
    name = "blocks.0.channel.weight"
    torch.testing.assert_close(both[name], (first[name] + second[name]) / 2)


def test_contrastive_gradients_are_means_over_the_views():
    """By many draws against back-propagation of the same loss."""
    model = model_of("M/2/2", width=8, blocks=2, head="contrastive", projector=6)
    (x, target), (y, _) = batch(4), batch(4, seed=1)
    truth = trainer_of(model, "LG-BP").gradients((x, y), target)[1]
    trainer = trainer_of(model, "LG-FG-A")
    draws = [trainer.gradients((x, y), target)[1] for _ in range(100)]
    names = [n for n in truth if "head" not in n and "readout" not in n]
    for block in ("blocks.0", "blocks.1"):
        own = [n for n in names if n.startswith(block)]
        size = sum(truth[n].square().sum() for n in own)
        along = torch.stack([sum((d[n] * truth[n]).sum() for n in own) / size for d in draws])
        # the views share their noise and their mean: half of the sum of both views' gradients
        assert abs(along.mean() - 1) < 4 * along.std() / len(draws) ** 0.5
    for name in truth:
        if "head" in name or "readout" in name:
            torch.testing.assert_close(draws[0][name], truth[name])


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_step_writes_what_gradients_says(estimator):
    model, data = model_of(), batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin = trainer_of(copy.deepcopy(model), estimator)
    expected = twin.gradients(*data)[1]
    trainer = trainer_of(model, estimator)
    losses = trainer.step(*data)
    assert torch.isfinite(losses).all()
    for name, parameter in model.named_parameters():
        change = expected.get(name, torch.zeros(()))
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * change, msg=name)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("estimator", ["LG-FG-A", "FG-W", "LG-FA"])
def test_checkpoint_goes_on_bit_for_bit(estimator):
    model, data = model_of(), batch()
    trainer = trainer_of(model, estimator)
    trainer.step(*data)
    other = trainer_of(model_of(), estimator)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for _ in range(2):
        assert torch.equal(trainer.step(*data), other.step(*data))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_frozen_parameters_change_nothing_for_the_others(estimator):
    full = gradients(estimator)[1]
    model = model_of()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].channel.weight.requires_grad_(False)
    model.blocks[1].head.bias.requires_grad_(False)
    found = gradients(estimator, model)[1]
    assert_same(found, {n: g for n, g in full.items() if model.get_parameter(n).requires_grad})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer_of(model, estimator).step(*batch())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved and all(model.get_parameter(n).requires_grad for n in moved)


def test_accumulation_adds_up():
    model, (x, target) = model_of(), batch(4)
    trainer = trainer_of(model, "LG-BP", accumulation_steps=2)
    whole = gradients("LG-BP", model, (x, target))[1]
    before = model.blocks[0].channel.weight.detach().clone()
    trainer.step(x[:2], target[:2])
    assert torch.equal(model.blocks[0].channel.weight, before)
    trainer.step(x[2:], target[2:])
    torch.testing.assert_close(model.blocks[0].channel.weight.detach(), before - 0.1 * whole["blocks.0.channel.weight"])


def test_bad_arguments():
    model = model_of()
    with pytest.raises(ValueError, match="estimator must be one of"):
        trainer_of(model, "FG")
    with pytest.raises(TypeError, match="model must be a lgkernels.nn.LocalMixer"):
        trainer_of(torch.nn.Linear(2, 2), "BP")
    with pytest.raises(ValueError, match="contrastive"):
        trainer_of(model_of(head="contrastive"), "FG-A")
    tied = model_of()
    tied.blocks[2].channel.weight = tied.blocks[1].channel.weight
    with pytest.raises(ValueError, match=r"share parameters, got one as blocks.1.channel.weight and blocks.2.chan"):
        trainer_of(tied, "BP")
    trainer = trainer_of(model, "LG-FG-A")
    with pytest.raises(ValueError, match="x must have shape"):
        trainer.step(torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="target"):
        trainer.step(batch()[0], torch.full((6,), 7))
    with pytest.raises(ValueError, match="x must be a batch of images"):
        trainer.step((batch()[0], batch()[0]), batch()[1])
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        trainer_of(model_of(head="contrastive"), "LG-FG-A").step((batch()[0], [1.0]), batch()[1])
    with pytest.raises(TypeError, match="x must be float64 like the model's parameters, got float32"):
        trainer.step(batch(dtype=torch.float32)[0], batch()[1])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="step.. takes gradients"):
        trainer.step(*batch())
    model.blocks[1].float()
    mixed = r"model's parameters must be of one dtype, got float\d\d \(.*\) and float\d\d \(.*\): convert the whole"
    with pytest.raises(TypeError, match=mixed):
        trainer.step(*batch())
    model.double()
    with pytest.raises(ValueError, match="x must have at least one sample"):  # the mean of no losses is no number
        trainer.step(batch()[0][:0], batch()[1][:0])


@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("token_mixing", [False, True])
def test_tangent_of_a_block_is_forward_mode_differentiation(perturb, token_mixing):
    """Of torch's own, along the noise and a tangent of the input, the residual's included."""
    block = lnn.LocalMixerBlock(8, 8, groups=2, patches=4, token_mixing=token_mixing, outputs=3, dtype=torch.float64)
    x, tangent = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    shapes = [(3, 4, 2, 4) if kind == "group" else (3, 4, 8) for kind, _ in block.stages()]
    if perturb == "activities":
        noise = [torch.randn(s, dtype=torch.float64) for s in shapes]
        primals, tangents = [torch.zeros_like(u) for u in noise], noise

        def function(x, *added):
            return block(x, added=added)

    else:
        noise = [tuple(torch.randn_like(p) for p in module.parameters()) for _, module in block.stages()]
        names = [name for name, _ in block.named_parameters() if "head" not in name]
        primals, tangents = [block.get_parameter(n).detach() for n in names], [u for pair in noise for u in pair]

        def function(x, *parameters):
            return torch.func.functional_call(block, dict(zip(names, parameters)), (x,))

    expected = torch.func.jvp(function, (x, *primals), (tangent, *tangents))
    got = perturbation.dual_block(block, x, tangent, noise, perturb, "auto")[:2]
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("estimator", ["LG-FG-A", "FG-A", "LG-FG-W", "FG-W"])
def test_autocast(estimator):
    """The products in bfloat16, all else as before: near the step in float32, gradients of the parameters' dtype."""
    data, found = batch(32, torch.float32), []
    model = model_of(dtype=torch.float32, width=256, blocks=2)  # norms of few channels magnify the rounding
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads = gradients(estimator, model, data, readout_factor=1.0)[1]
        assert {g.dtype for g in grads.values()} == {torch.float32}
        found.append({n: g for n, g in grads.items() if n.endswith("weight")})
    for name, gradient in found[0].items():
        assert F.cosine_similarity(gradient.flatten(), found[1][name].flatten(), dim=0) > 0.95, name


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
@pytest.mark.parametrize("estimator, most", [("LG-FG-A", 14), ("LG-FG-W", 11), ("FG-W", 11)])
def test_a_step_keeps_the_primals_of_one_block_and_of_weights_nothing(estimator, most):
    """In activities of a stage. A block has three stages, each with its input and output, and outputs of norms have
    their tangents beside them."""
    (x, target), model = batch(256, torch.float32), model_of(dtype=torch.float32, width=32, blocks=5)
    trainer = trainer_of(model, estimator)
    activity = 4 * len(x) * 16 * 32
    assert peak_memory(lambda: trainer.step(x, target), x.device) <= most * activity


@pytest.mark.unpoisoned
@pytest.mark.parametrize("estimator", ["LG-FG-A", "FG-A", "FG-W"])
@pytest.mark.parametrize("derivative", ["forward", "finite_difference"])
def test_draws_come_one_after_the_other(estimator, derivative):
    """A second draw needs the room of the first one and the sums of their gradients."""
    (x, target), model = batch(256, torch.float32), model_of(dtype=torch.float32, width=32, blocks=2)
    peaks = []
    for draws in (1, 2):
        trainer = trainer_of(model, estimator, draws=draws, derivative=derivative)
        peaks.append(peak_memory(lambda trainer=trainer: trainer.step(x, target), x.device))
    assert peaks[1] < peaks[0] + 4 * len(x) * 16 * 32 / 8  # an eighth of an activity


# -- the modules ------------------------------------------------------------------------------------------------------


def test_group_linear_is_a_linear_layer_for_each_group():
    layer, x = lnn.GroupLinear(2, 3, 4), torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x)[:, 1], F.linear(x[:, 1], layer.weight[1], layer.bias[1]))
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 2, 3\), got \(5, 3, 3\)"):
        layer(torch.randn(5, 3, 3))


def test_a_mixer_of_no_image():
    assert model_of()(batch(0)[0]).shape == (0, 5)
