"""The expectation of `forward_gradient` of any module is the gradient of back-propagation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.functional import forward_gradient
from lgkernels.functional import forward_gradient_passes as passes
from lgkernels.functional.forward_gradient_layers import is_layer, local_gradients
from lgkernels.random import RandomFeedback
from tests.forward_gradient.estimates import (
    CNN,
    DOUBLE,
    DRAWS,
    REAL,
    TARGET,
    check,
    exact,
    expectation,
    image,
    losses_of,
    one_thread,  # noqa: F401  a fixture
    real,
)
from tests.support.tolerances import GOLDEN, assert_accurate, assert_relative

# -- the expectation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
@pytest.mark.parametrize("name", REAL)
def test_the_expectation_is_the_gradient(name, perturb, reduction):
    model, x = real(name)
    losses = losses_of(model, reduction)
    check(losses, x, TARGET, modules=model, draws=DRAWS, perturb=perturb)
    layers = {n for n, m in model.named_modules() if is_layer(m)}
    assert layers >= {"cnn": {"first", "second", "head"}, "recurrent": {"embed", "head"}}.get(name, {"token", "head"})


@pytest.mark.parametrize("name", REAL)
def test_float32(name):
    model, x = real(name, torch.float32)
    check(losses_of(model), x, TARGET, modules=model, draws=DRAWS, tolerance=GOLDEN["float32_gradient"])


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_halves_and_autocast(perturb):
    """The same noise gives the same estimate, but for the rounding."""
    model, x = real("cnn", torch.bfloat16)

    def estimate(x):
        noise = RandomFeedback(1, law="sign")
        return forward_gradient(losses_of(model.eval()), x, TARGET, modules=model, noise=noise, perturb=perturb)[1]

    half = estimate(x)
    model.float()
    truth = estimate(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = estimate(x.float())
    for gradients, dtype in ((half, torch.bfloat16), (mixed, torch.float32)):
        assert {g.dtype for g in gradients.values()} == {dtype}
        together = [torch.cat([g.flatten() for g in of.values()]) for of in (gradients, truth)]
        assert_relative(str(dtype), *together, GOLDEN["half_gradient"])


@pytest.mark.parametrize(
    "name, noise",
    [("cnn", None), ("attention", dict(law="normal", scale=0.5)), ("recurrent", dict(law="sign", scale=2.0))],
)
def test_the_mean_over_draws_is_within_its_standard_error(name, noise):
    model, x = real(name)
    model.eval()  # no dropout: one gradient
    losses = losses_of(model)
    _, expected = exact(losses, x, TARGET, modules=model)
    torch.manual_seed(5)
    noise = None if noise is None else RandomFeedback(7, **noise)
    calls = [forward_gradient(losses, x, TARGET, modules=model, draws=8, noise=noise)[1] for _ in range(24)]
    deviations = []
    for parameter, true in expected.items():
        values = torch.stack([gradients[parameter] for gradients in calls])
        moving = values.std(0) > 0  # what no noise reaches is 0 in each
        assert torch.equal(values.mean(0)[~moving], true[~moving])
        deviations.append(((values.mean(0) - true) / (values.std(0) / 24**0.5))[moving].flatten())
    deviation = torch.cat(deviations).square().mean().sqrt()
    assert 0.6 < deviation < 1.5, f"{deviation:.2f} standard errors (rms)"


def test_many_draws_vary_less():
    model, x = real("cnn")
    model.eval()

    def variance(**options):
        torch.manual_seed(0)
        calls = [forward_gradient(losses_of(model), x, TARGET, modules=model, **options)[1] for _ in range(30)]
        return sum(torch.stack([g[n] for g in calls]).var(0).sum() for n in calls[0])

    one = variance()
    assert variance(draws=8) < one / 4
    assert one < variance(perturb="weights")


# -- what belongs to whom ---------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """As many positions as samples: row n of their embedding belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(3, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(torch.tanh(x + self.positions(torch.arange(3)))).sum((1, 2))


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.attention = nn.MultiheadAttention(2, 1)

    def forward(self, x):
        x = self.token(x.transpose(0, 1))
        return torch.tanh(self.head(x + self.attention(x, x, x)[0])).sum((0, 2))


class Moved(nn.Module):
    """Row n of the layer's output moves the loss of another sample."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x).roll(1, 0))).sum((1, 2))


class Contrasted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        z = torch.tanh(self.layer(x.flatten(1)))
        return F.cross_entropy(z @ z.t(), torch.arange(len(z)), reduction="none")


def tried(function, *inputs, **options):
    """(passes that were made to see it, whether the samples are separate) in a call of one draw."""
    called, found, separate = [], [], passes.Estimate._are_separate

    def counted(*inputs):
        called.append(1)
        return function(*inputs)

    def watched(estimate, losses):
        found.append(separate(estimate, losses))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.Estimate, "_are_separate", watched)
        forward_gradient(counted, *inputs, **options)
    (answer,) = found
    return len(called) - 2, answer


@pytest.mark.parametrize("make, draws", [(Positions, 32), (SequenceFirst, 64), (Moved, 32), (Contrasted, 8)])
def test_samples_that_mix_are_found(make, draws):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 3, 2, dtype=DOUBLE)
    check(model, x, modules=model, draws=DRAWS)


def test_batch_normalisation_mixes_in_training_alone():
    torch.manual_seed(0)
    model = CNN(nn.BatchNorm2d(2)).double()
    check(losses_of(model), image(), TARGET, modules=model, draws=128)
    assert tried(losses_of(model), image(), TARGET, modules=model) == (1, False)
    model.eval()
    check(losses_of(model), image(), TARGET, modules=model, draws=128)
    assert tried(losses_of(model), image(), TARGET, modules=model) == (3, True)


@pytest.mark.parametrize("separate, passes", [(None, 5), (True, 2), (False, 2)])
def test_what_is_said_of_the_samples_is_not_tried(separate, passes):
    model, called = CNN(nn.Identity()).double(), []

    def losses(*inputs):
        called.append(1)
        return losses_of(model)(*inputs)

    forward_gradient(losses, image(), TARGET, modules=model, separate=separate)
    assert len(called) == passes
    check(losses, image(), TARGET, modules=model, separate=separate, draws=128)


PAIRS = {
    "within a half": (4, [(0, 1), (2, 3)]),
    "two views": (8, [(i, (i + 4) % 8) for i in range(8)]),
    "one direction": (2, [(0, 1)]),
    "the other": (2, [(1, 0)]),
    "one pair of many": (37, [(36, 17)]),
    "sums of two": (4, [(0, 1), (0, 2)]),
}


@pytest.mark.parametrize("law", ["normal", "sign"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_samples_is_tried(name, law):
    """(i, j): the loss of i depends on the output of j."""
    count, pairs = PAIRS[name]
    torch.manual_seed(0)
    layer, x = nn.Linear(1, 1).double(), torch.ones(count, 1, dtype=DOUBLE)

    def losses(x):
        z = layer(x)[:, 0]
        coupling = torch.zeros(count, count, dtype=DOUBLE)
        coupling[tuple(zip(*pairs))] = 1
        return z.square() + coupling @ z

    for seed in range(4):
        assert not tried(losses, x, modules=layer, noise=RandomFeedback(seed, law=law))[1]
        assert tried(lambda x: layer(x)[:, 0].square(), x, modules=layer, noise=RandomFeedback(seed, law=law))[1]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 20, 35, 36, 128, 300])
def test_each_sample_is_once_perturbed_without_each_other(count):
    subsets = passes._subsets(count)
    alone = (subsets.unsqueeze(2) & ~subsets.unsqueeze(1)).any(0)  # [i, j]: i was perturbed, and j was not
    assert subsets.shape == (len(subsets), count) and (alone | torch.eye(count, dtype=torch.bool)).all()
    assert len(subsets) == {2: 2, 3: 3, 4: 4, 7: 5, 20: 6, 35: 7, 36: 8, 128: 10, 300: 11}[count]


def test_what_an_earlier_call_found_does_not_count():
    """Arguments, closures and weights decide whether samples mix."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2, bias=False).double(), torch.randn(4, 3, dtype=DOUBLE)
    weights = torch.arange(1.0, 9.0, dtype=DOUBLE).view(4, 2)

    def losses(x, mix):
        z = model(x)
        own = z.square().sum(1)
        return own + (z.mean(0) * weights).sum(1) * 3 if mix else own

    for mix in (False, True, False):
        assert tried(losses, x, mix, modules=model)[1] == (not mix)
        check(losses, x, mix, modules=model, draws=8)


def test_contrasted_views():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=DOUBLE)
    check(lambda x: -F.cosine_similarity(z := model(x), z.roll(4, 0)), x, modules=model, draws=16)


def test_own_losses_vary_less_than_the_mean():
    model, x = real("cnn")
    model.eval()

    def variance(reduction):
        torch.manual_seed(0)
        losses = losses_of(model, reduction)
        return (
            torch.stack([forward_gradient(losses, x, TARGET, modules=model)[1]["first.weight"] for _ in range(60)])
            .var(0)
            .sum()
        )

    assert variance("none") < 0.7 * variance("mean")


class Shared(nn.Module):
    """A layer that is called twice, weights that a function uses, a bias that two layers share, an unused layer, one
    whose forward is called past its hooks."""

    def __init__(self):
        super().__init__()
        self.twice, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
        self.tied = nn.Embedding(4, 2, padding_idx=3)  # whose last row has a gradient as weights
        self.left, self.right, self.past = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.right.bias = self.left.bias

    def forward(self, x, target):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x) + self.tied(target))))
        x = torch.tanh(self.past.forward(self.right(self.left(x))))
        size = self.left.weight.detach().norm() + self.right.weight.data.norm()  # through which no gradient flows
        return size * F.cross_entropy(F.linear(x, self.tied.weight), target, reduction="none")


def test_parameters_that_are_used_elsewhere():
    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(3, 2, dtype=DOUBLE)
    for _ in range(2):  # the second time it is known
        check(model, x, TARGET, modules=model, draws=64)
    (outside,) = passes._OUTSIDE[model].values()
    assert outside == {"tied.weight", "past.weight", "past.bias"}


def test_subclasses_and_parametrized_layers():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(nn.Linear):
        pass

    torch.manual_seed(0)
    computed = nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Tanh())
    instance = nn.Linear(2, 2)
    instance.forward = lambda x: F.linear(x, instance.weight) + 3 * instance.bias
    model = nn.Sequential(Scaled(2, 2), nn.Tanh(), Plain(2, 2), computed, nn.Tanh(), instance).double()
    assert [is_layer(m) for m in model] == [False, False, True, False, False, False]
    check(lambda x: model(x).sum(1), torch.randn(3, 2, dtype=DOUBLE), modules=model, draws=64)


def test_hooks_of_others_see_the_layer_as_it_was():
    """The noise is added to what the layer's own forward gave; a hook that changes inputs comes before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    model[0].register_forward_hook(lambda module, args, out: torch.tanh(out))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    check(lambda x: model(x).sum(1), torch.randn(3, 2, dtype=DOUBLE), modules=model, draws=16)
    assert len(model[0]._forward_hooks) == 1 and not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_frozen_parameters():
    model, x = real("cnn")
    for name in ("first.weight", "norm.bias", "head.weight", "head.bias"):
        model.get_parameter(name).requires_grad_(False)
    check(losses_of(model), x, TARGET, modules=model, draws=DRAWS)


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_rows_of_padding_have_no_gradient(perturb):
    model, x = real("attention")
    _, gradients = forward_gradient(losses_of(model), x, TARGET, modules=model, perturb=perturb)
    assert (gradients["token.weight"][0] == 0).all() and (gradients["token.weight"][1:] != 0).any()


def test_names_of_several_modules():
    torch.manual_seed(0)
    a, b = nn.Linear(2, 2).double(), nn.Sequential(nn.Linear(2, 1)).double()
    x = torch.randn(3, 2, dtype=DOUBLE)

    def losses(x):
        return b(torch.tanh(a(x))).squeeze(1)

    expected = exact(losses, x, modules=nn.ModuleList([a, b]))[1]
    for modules, prefixes in (([a, b], "01"), ((a, b, a), "01"), ({"enc": a, "dec": b}, ("enc", "dec"))):
        _, gradients = expectation(losses, x, modules=modules, draws=16)
        for prefix, i in zip(prefixes, "01"):
            for name in [n for n in expected if n.startswith(i)]:
                assert_relative(name, gradients.pop(prefix + name[1:]), expected[name], GOLDEN["float64"])
        assert not gradients


# -- a layer's own gradient -------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(3, 4), (2, 5, 3)),
    "linear of a vector": (nn.Linear(3, 4, bias=False), (3,)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (2, 3, 5, 6)),
    "conv2d same": (nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 5, 6)),
    "conv2d valid": (nn.Conv2d(3, 4, 3, padding="valid", bias=False), (2, 3, 5, 6)),
    "conv2d reflect": (nn.Conv2d(3, 4, 3, padding=1, stride=2, padding_mode="reflect"), (2, 3, 5, 6)),
    "conv2d without a batch": (nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2, groups=2), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 4)),
    "embedding": (nn.Embedding(7, 3, padding_idx=-2), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_local_gradients(name):
    layer, shape = LAYERS[name]
    layer.double()
    torch.manual_seed(0)
    x = torch.randint(7, shape) if name == "embedding" else torch.randn(shape, dtype=DOUBLE)
    assert is_layer(layer)
    out = layer(x)
    error = torch.randn_like(out)
    parameters = dict(layer.named_parameters())
    expected = torch.autograd.grad(out, list(parameters.values()), error)
    found = local_gradients(layer, x, error, {n: n for n in parameters})
    assert found.keys() == parameters.keys()
    for (parameter, gradient), true in zip(found.items(), expected):
        assert_accurate(parameter, gradient, true, true, length=64)


def test_transposed_convolution_of_a_given_size():
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(1, 2, 3, stride=2).double(), torch.randn(2, 1, 2, 2, dtype=DOUBLE)
    check(lambda x: layer(x, output_size=(6, 5)).pow(2).sum((1, 2, 3)), x, modules=layer, draws=128)
