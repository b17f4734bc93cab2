"""`forward_gradient` of any module: its expectation is the gradient of back-propagation.

The estimate is quadratic in the noise, so its expectation over signs is its mean over any set of sign vectors whose
second moments are those of independent ones. The rows of a Hadamard matrix are such a set: as many draws as there are
perturbed elements give the expectation exactly.
"""

import functools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.functional import forward_gradient
from lgkernels.functional import forward_gradient_passes as passes
from lgkernels.functional.forward_gradient_layers import is_layer, local_gradients
from lgkernels.random import RandomFeedback
from tests.support.calls import all_calls, is_float, weighted
from tests.support.tolerances import GOLDEN, assert_accurate, assert_relative

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of passes through a few numbers: a second thread would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Hadamard(RandomFeedback):
    """Element j of draw i is the sign (i, j) of a Hadamard matrix of `draws` rows, times scale."""

    def __init__(self, draws, scale=1.0):
        super().__init__(0, law="sign", scale=scale)
        self.draws, self.first, self.elements = draws, {}, 0

    def materialize(self, shape, device=None, dtype=None, *, offset=(0, 0)):
        region, row = divmod(offset[0], 2**32 // (2 * self.draws))  # each draw has a region for weights, and another
        draw, of_outputs = divmod(region, 2)
        count = int(np.prod(shape))
        if (of_outputs, row) not in self.first:
            self.first[of_outputs, row] = self.elements
            self.elements += count
        columns = np.arange(count) + self.first[of_outputs, row]
        assert self.elements <= self.draws, f"{self.draws} draws are too few for {self.elements} elements"
        odd = np.array([bin(draw & j).count("1") & 1 for j in columns.tolist()])
        return torch.from_numpy(self.scale * (1.0 - 2.0 * odd)).view(shape).to(device=device, dtype=dtype)


def expectation(function, *inputs, draws, scale=1.0, **options):
    torch.manual_seed(3)
    return forward_gradient(function, *inputs, draws=draws, noise=Hadamard(draws, scale), **options)


def exact(function, *inputs, modules):
    """By back-propagation, from the same masks of dropout."""
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        loss = function(*inputs).mean()
    parameters = dict(modules.named_parameters())
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return loss, {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(learning.items(), gradients)}


def check(function, *inputs, modules, draws, tolerance=GOLDEN["float64"], **options):
    loss, gradients = expectation(function, *inputs, modules=modules, draws=draws, **options)
    true_loss, expected = exact(function, *inputs, modules=modules)
    assert_relative("loss", loss, true_loss, tolerance)
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        parameter = dict(modules.named_parameters())[name]
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
    together = [
        torch.cat([g.flatten() for g in of.values()]) for of in (gradients, expected)
    ]  # a bias before a norm is 0
    assert_relative("gradients", *together, tolerance)


class CNN(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 3, stride=2, padding="valid"), norm or nn.GroupNorm(1, 2)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.second = nn.Conv2d(2, 2, 2, padding="same", groups=2, padding_mode="circular")
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(self.relu(self.norm(self.first(x))))
        return self.head(torch.tanh(self.second(x)).flatten(1))


class Block(nn.Module):
    """A transformer block on tokens with a learned position, and the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(5, 3, padding_idx=0), nn.Parameter(torch.randn(2, 3) / 3)
        self.block = nn.TransformerEncoderLayer(3, 1, 2, dropout=0.2, batch_first=True, activation="gelu")
        self.head = nn.Linear(3, 3)

    def forward(self, indices):
        return self.head(self.block(self.token(indices) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self, cell=nn.GRUCell):
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(2, 2), cell(2, 3), nn.Linear(3, 3)

    def forward(self, x):
        state = torch.zeros(len(x), 3, dtype=x.dtype)
        for step in range(x.shape[1]):  # the same layer at each step
            state = self.cell(torch.tanh(self.embed(x[:, step])), state)
        return self.head(state)


TARGET = torch.tensor([0, 2, 1])


@functools.cache
def image():
    return torch.randn(3, 1, 5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))


@functools.cache
def sequence():
    return torch.randn(3, 2, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


INDICES = torch.tensor([[1, 4], [2, 0], [3, 2]])
REAL = {"cnn": (CNN, image), "attention": (Block, lambda: INDICES), "recurrent": (Recurrent, sequence)}
DRAWS = 128  # more than elements that are perturbed


def real(name, dtype=DOUBLE):
    torch.manual_seed(0)
    make, x = REAL[name]
    x = x()
    return make().to(dtype), x.to(dtype) if x.is_floating_point() else x


def losses_of(model, reduction="none"):
    return lambda x, target: F.cross_entropy(model(x), target, reduction=reduction)


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


@pytest.mark.parametrize("make, draws", [(Positions, 32), (SequenceFirst, 64), (Moved, 32), (Contrasted, 8)])
def test_samples_that_mix_are_found(make, draws):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 3, 2, dtype=DOUBLE)
    check(model, x, modules=model, draws=DRAWS)


def test_batch_normalisation_mixes_in_training_alone():
    torch.manual_seed(0)
    model = CNN(nn.BatchNorm2d(2)).double()
    check(losses_of(model), image(), TARGET, modules=model, draws=128)
    model.eval()
    check(losses_of(model), image(), TARGET, modules=model, draws=128)
    found = [mixed for facts in passes._FACTS[model].values() for mixed in facts.separate.values()]
    assert sorted(found) == [False, True]


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
    (facts,) = passes._FACTS[model].values()
    assert facts.outside == {"tied.weight", "past.weight", "past.bias"}


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


# -- what a call leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_a_call_leaves_what_one_forward_leaves(perturb, draws):
    torch.manual_seed(0)
    model = CNN(nn.BatchNorm2d(2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    loss = losses_of(model, "mean")(image(), TARGET)
    after, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    model.load_state_dict(before)
    torch.manual_seed(1)
    options = dict(modules=model, perturb=perturb, draws=draws, noise=RandomFeedback(0, law="sign"))
    found, _ = forward_gradient(losses_of(model), image(), TARGET, **options)
    assert torch.equal(found, loss) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() and all(p.grad is None for p in model.parameters())


class Counting(nn.Module):
    """What it computes depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("calls", torch.zeros((), dtype=DOUBLE))
        self.register_buffer("mean", torch.ones(2, dtype=DOUBLE))

    def forward(self, x):
        self.calls = self.calls + 1
        self.mean.mul_(0.5)
        return torch.tanh(self.layer(self.calls * x + self.mean)).squeeze(1)


def test_buffers_are_the_same_in_each_pass():
    torch.manual_seed(0)
    model, x = Counting().double(), torch.randn(3, 2, dtype=DOUBLE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = exact(model, x, modules=model)[1]
    model.load_state_dict(before)
    _, gradients = expectation(model, x, draws=8)
    assert_relative("weight", gradients["layer.weight"], expected["layer.weight"], GOLDEN["float64"])
    assert model.calls == 1 and model.mean[0] == 0.5


def test_noise_moves_by_one_step():
    model, x = real("recurrent")
    noise = RandomFeedback(3, law="normal")

    def call(**options):
        return forward_gradient(losses_of(model), x, TARGET, modules=model, draws=2, **options)[1]["head.weight"]

    first, second = call(noise=noise), call(noise=noise)
    assert noise.state[2] == 2 and not torch.equal(first, second)
    noise.set_state(3, 0, 1)
    assert torch.equal(call(noise=noise), second)
    scaled = RandomFeedback(3, law="normal", scale=8.0)
    assert_relative("of another scale", call(noise=scaled), first, GOLDEN["float32_gradient"])
    torch.manual_seed(0)
    first, second = call(), call()
    torch.manual_seed(0)
    assert torch.equal(call(), first) and not torch.equal(first, second)


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_no_graph_is_kept(perturb):
    model, x = real("attention")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        loss, gradients = forward_gradient(losses_of(model), x, TARGET, modules=model, perturb=perturb)
    assert not saved and not any(t.requires_grad for t in (loss, *gradients.values()))
    assert forward_ad._current_level == -1


class _Live(TorchDispatchMode):
    """The largest number of bytes that results of ops take at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.largest = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.largest = max(self.largest, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_memory_does_not_grow_with_depth(perturb):
    def memory(depth):
        torch.manual_seed(0)
        model = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(4, 4), nn.Tanh())])
        with _Live() as live:
            forward_gradient(lambda x: model(x).sum(1), torch.ones(2000, 4), modules=model, perturb=perturb)
        return live.largest

    def of_graph(depth):
        model = nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(4, 4), nn.Tanh())])
        with _Live() as live:
            model(torch.ones(2000, 4)).sum().backward()
        return live.largest

    activations = 2000 * 4 * 4
    assert of_graph(24) - of_graph(4) > 15 * activations
    assert memory(24) - memory(4) < activations / 2


def test_inputs_of_inference_mode_and_gradients():
    model, x = real("cnn")
    noise = functools.partial(RandomFeedback, 0, law="sign")
    expected = forward_gradient(losses_of(model.eval()), x, TARGET, modules=model, noise=noise())[1]
    with torch.inference_mode():
        inference = forward_gradient(losses_of(model), x.clone(), TARGET, modules=model, noise=noise())[1]
    learning = forward_gradient(losses_of(model), x.clone().requires_grad_(), TARGET, modules=model, noise=noise())[1]
    for name, gradient in expected.items():
        assert torch.equal(inference[name], gradient) and torch.equal(learning[name], gradient)
        assert not inference[name].is_inference()


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


# -- errors -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lgkernels_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class DoubleWithTangent(torch.autograd.Function):
    """An op that is unknown to forward mode, inside of a function that knows its derivative."""

    @staticmethod
    def forward(x):
        return twice(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 2


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Flash(nn.Module):
    def forward(self, x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


def between(module, shape=(2, 3, 4)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Flatten(), nn.LazyLinear(1))
    model(torch.ones(shape))
    return model, torch.ones(shape)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    "module, op, way",
    [
        (Flash(), "_scaled_dot_product_flash_attention_for_cpu in Flash '1'", "SDPBackend.MATH"),
        (Calling(lambda x: nn.LSTM(4, 4)(x)[0]), "mkldnn_rnn_layer in Calling '1'", "LSTMCell"),
        (Calling(lambda x: torch.cdist(x, x)), "_cdist_forward in Calling '1'", "torch's ops"),
        (Calling(twice), "lgkernels_tests.twice.default in Calling '1'", "with a jvp"),
        (Calling(torch.ops.lgkernels_tests.twice), "lgkernels_tests.twice in Calling '1'", "with a jvp"),
        (Calling(Double.apply), "Double in Calling '1'", "with a jvp"),
        (
            Calling(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)),
            "CheckpointFunction",
            "",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_an_op_without_forward_mode_is_named(module, op, way, perturb):
    model, x = between(module)
    with pytest.raises(NotImplementedError) as raised:
        forward_gradient(lambda x: model(x).mean(), x, modules=model, perturb=perturb)
    assert f"can't differentiate {op}" in str(raised.value) and way in str(raised.value)
    assert forward_ad._current_level == -1 and not any(m._forward_hooks for m in model.modules())


def test_what_has_a_derivative_or_needs_none_is_left_alone():
    model, x = between(Calling(DoubleWithTangent.apply))
    forward_gradient(lambda x: model(x).mean(), x, modules=model)
    model = nn.Sequential(Calling(twice), nn.Linear(4, 1))  # before any noise
    forward_gradient(lambda x: model(x).mean(), x, modules=model)
    model, x = between(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True))
    for perturb in ("activities", "weights"):  # by no fast path
        forward_gradient(lambda x: model.eval()(x).mean(), x, modules=model, perturb=perturb, draws=2)
    model, x = between(Calling(lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)))
    forward_gradient(lambda x: model(x).mean(), x, modules=model)


@pytest.mark.parametrize("make", [lnn.FeedbackAlignmentLinear, lnn.SignSymmetricLinear])
def test_layers_with_a_rule_of_their_own_are_named(make):
    model, x = between(make(4, 4))
    with pytest.raises(NotImplementedError, match=f"in {make.__name__} '1'.* a rule of its own"):
        forward_gradient(lambda x: model(x).mean(), x, modules=model)


@pytest.mark.parametrize(
    "name",
    ["lls_loss", "feedback_linear", "sign_symmetric_conv2d", "local_cross_entropy", "goodness_loss", "nt_xent_loss"]
    + ["lora_linear", "lokr_conv2d", "similarity_matching_loss", "peer_normalization_loss"],
)
def test_rules_of_ours_are_named(name):
    """None of them drops a tangent in silence."""
    call = all_calls()[name]

    class Rule(nn.Module):
        def __init__(self):
            super().__init__()
            for argument, value in call.arguments.items():
                if is_float(value):
                    self.register_parameter(argument, nn.Parameter(value.clone()))

        def forward(self):
            return weighted(getattr(LF, name)(**{**call.arguments, **dict(self.named_parameters())}))

    with pytest.raises(NotImplementedError, match=f"can't differentiate {name} in Rule: .* a rule of its own"):
        forward_gradient(Rule())


def test_compiled_modules_run_eagerly():
    model, x = real("recurrent")
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    check(losses_of(compiled), x, TARGET, modules=model, draws=DRAWS)
    partly = torch.compile(
        lambda x: forward_gradient(losses_of(model), x, TARGET, modules=model)[0] * 2, backend="eager"
    )
    assert torch.equal(partly(x), 2 * losses_of(model, "mean")(x, TARGET))
    whole = torch.compile(lambda x: forward_gradient(model, x)[0], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="forward_gradient does not run under torch.compile"):
        whole(x)


def test_inside_of_other_derivatives():
    model, x = real("recurrent")
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="another forward-mode derivative"):
        forward_gradient(losses_of(model), x, TARGET, modules=model)
    with pytest.raises(NotImplementedError, match="torch.func transforms"):
        torch.func.grad(lambda x: forward_gradient(losses_of(model), x, TARGET, modules=model)[0])(x)


def test_functions_that_can_not_be_estimated():
    model, x = real("recurrent")
    call = functools.partial(forward_gradient, modules=model)
    cases = [
        (lambda x: model(x), ValueError, r"function must return a loss .*, got shape \(3, 3\)"),
        (lambda x: (model(x).mean(),), TypeError, r"function must return a loss .*, got tuple"),
        (lambda x: model(x).argmax(), TypeError, r"function must return a loss .*, got int64"),
        (lambda x: model(x).detach().mean(), ValueError, "function must return losses that depend on"),
        (lambda x: model(x).mean() * next(numbers), ValueError, "function must do the same each time.*other losses"),
        (
            lambda x: model(x[:, : next(steps)]).mean(),
            ValueError,
            "function must do the same each time.*in another place",
        ),
        (
            lambda x: model(x[:, : 3 - next(steps)]).mean(),
            ValueError,
            "function must do the same each time.*(fewer calls|in another place)",
        ),
        (lambda x: model(x[: next(steps)]).mean(), ValueError, "function must do the same each time.*in another place"),
    ]
    for function, error, message in cases:
        numbers, steps = iter(range(1, 9)), iter([1, 2, 3])
        with pytest.raises(error, match=message):
            call(function, x)
    with pytest.raises(TypeError, match="modules must be a torch.nn.Module, or a list or dict.*, got None"):
        forward_gradient(lambda x: x, x)
    with pytest.raises(ValueError, match="modules must have parameters that require a gradient, got none"):
        forward_gradient(model.requires_grad_(False), x)
    with pytest.raises(TypeError, match="modules must be initialized, got a lazy weight"):
        forward_gradient(nn.LazyLinear(3), x)
    with pytest.raises(ValueError, match="noise must be of the law 'normal' or 'sign', whose mean is 0, got 'uniform'"):
        forward_gradient(model.requires_grad_(), x, noise=RandomFeedback(0))


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(count):
    model, x = real("recurrent")
    loss, gradients = forward_gradient(losses_of(model), x[:count], TARGET[:count], modules=model)
    assert (
        loss.isfinite() == bool(count)
        and all(g.isfinite().all() == bool(count) for g in gradients.values())
        or not count
    )
