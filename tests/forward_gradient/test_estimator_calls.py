"""What a call of `forward_gradient` leaves behind, what it costs, and what it refuses by name."""

import functools
import weakref

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
from lgkernels.random import RandomFeedback
from tests.forward_gradient.estimates import (
    CNN,
    DOUBLE,
    DRAWS,
    TARGET,
    check,
    exact,
    expectation,
    image,
    losses_of,
    one_thread,  # noqa: F401  a fixture
    real,
)
from tests.support.calls import all_calls, is_float, weighted
from tests.support.tolerances import GOLDEN, assert_relative

# -- what a call leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_a_call_leaves_what_one_forward_leaves(perturb, draws):
    torch.manual_seed(0)
    model = CNN(nn.BatchNorm2d(2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    loss = losses_of(model)(image(), TARGET).mean()
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
    name = {"FeedbackAlignmentLinear": "feedback_linear"}.get(make.__name__, "sign_symmetric_linear")
    with pytest.raises(NotImplementedError, match=f"differentiate {name} in {make.__name__} '1'.* a rule of its own"):
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
    with pytest.raises(
        TypeError, match=r"inputs must be what Recurrent.forward takes \(too many .*must return its loss"
    ):
        forward_gradient(model, x, TARGET)
    with pytest.raises(ValueError, match=r"got shape \(3, 3\): pass a function that .* returns its loss, and modules="):
        forward_gradient(model, x)
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


@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_a_layer_inside_of_a_function_is_refused(perturb):
    """Reentrant checkpoints are an autograd.Function: the tangents that begin inside would be lost."""
    from torch.utils.checkpoint import checkpoint

    model, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)), torch.randn(4, 3)

    def losses(x, reentrant):
        return checkpoint(model, x, use_reentrant=reentrant).square().sum(1)

    forward_gradient(losses, x, False, modules=model, perturb=perturb)
    with pytest.raises(NotImplementedError, match="can't differentiate '0' in an .* use_reentrant=False"):
        forward_gradient(losses, x.requires_grad_(), True, modules=model, perturb=perturb)
