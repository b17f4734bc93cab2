"""What an autograd Function of this form cannot do is refused by name, in eager and compiled code and in exports."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core.accuracy import C
from tests.support.calls import all_calls, is_float, weighted
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_relative

pytestmark = pytest.mark.unpoisoned

X, Y = randn(3, 6), targets(3, 4)
CALLS = all_calls()
FIRST = {
    (name, next(filter(lambda own: is_float(call.arguments[own]), call.arguments), "")) for name, call in CALLS.items()
}
ARGUMENTS = [(name, own) for name, call in CALLS.items() for own, value in call.arguments.items() if is_float(value)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_autograd(function, x):
    """What loss.backward() gives: (loss, gradient or None)."""
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), leaf.grad


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.ones(()))[0],
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x + 1,))[1],
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "vmap": lambda function, x: torch.vmap(function)(torch.stack([x, x * 2])),
    "per sample": lambda function, x: torch.vmap(torch.func.grad(function))(torch.stack([x, x * 2])),
    "compiled": lambda function, x: torch.compile(torch.func.grad(function), backend="eager")(x),
    "per sample compiled": lambda function, x: torch.compile(torch.vmap(torch.func.grad(function)), backend="eager")(
        torch.stack([x, x * 2])
    ),
}
COMPILED = [name for name in TRANSFORMS if "compiled" in name]


def check(transform, function, x, names, cuts=False):
    """The value that autograd gives, or a refusal by name; where autograd gives none, a refusal, or 0 from what `cuts`
    the graph: a module, whose block with a loss of its own cuts its input off."""
    loss, gradient = by_autograd(function, x)
    try:
        result = TRANSFORMS[transform](function, x)
    except NotImplementedError as refused:
        assert any(str(refused).startswith(f"{name} does not support torch.func") for name in names)
        return
    except (torch._dynamo.exc.InternalTorchDynamoError, AssertionError):
        # Dynamo goes on after the refusal, frame by frame, and in a module meets tensors of torch.func that it has no
        # picture of: torch's own message, but no wrong value.
        assert cuts and transform in COMPILED
        return
    if transform == "vmap":
        assert_relative("value", result, torch.stack([loss, by_autograd(function, x * 2)[0]]), 1e-6)
        return
    if gradient is None:
        assert cuts and not result.any(), "a derivative of what has none"
        return
    if "per sample" in transform:
        expected = torch.stack([gradient, by_autograd(function, x * 2)[1]])
    elif transform == "jvp":
        terms = gradient * (x + 1)
        expected, noise = terms.sum(), C * torch.finfo(x.dtype).eps * terms.numel() ** 0.5 * terms.abs().sum()
        if expected.abs() <= noise:  # 0 but for rounding, as along what a layer norm takes out
            assert result.abs() <= noise
            return
    else:
        expected = gradient
    assert_relative("derivative", result, expected, 1e-5)


def test_every_function_is_here():
    assert set(CALLS) == set(LF.__all__)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name, own", ARGUMENTS)
@pytest.mark.only(where=lambda name, own, transform: transform != "per sample compiled" or (name, own) in FIRST)
def test_functions(name, own, transform):
    """Compiled, Dynamo would drop the rule in silence and give exact back-propagation, or 0."""
    arguments = CALLS[name].arguments

    def function(x):
        return weighted(getattr(LF, name)(**{**arguments, own: x}))

    check(transform, function, arguments[own], [name])


def test_a_whole_graph_is_not_silent():
    def function(x):
        return LF.local_cross_entropy(x, randn(4, 6), None, Y)

    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)):
        torch.compile(torch.func.grad(function), backend="aot_eager", fullgraph=True)(X)


def _conv():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())


IMAGES, LABELS = randn(3, 3, 6, 6), targets(3, 5)
LLS = dict(num_classes=5, pool_size=2)
MODULES = {  # {public module: (an instance of it, arguments of its forward, the functions that may refuse)}
    "BarlowTwinsHead": (lambda: lnn.BarlowTwinsHead(_conv(), 4, dim=3), (randn(12, 3, 6, 6), LABELS), ()),
    "ClassifierBlock": (lambda: lnn.ClassifierBlock(torch.nn.Linear(6, 5)), (X, LABELS), ()),
    "ContrastiveHead": (lambda: lnn.ContrastiveHead(_conv(), 4, dim=4), (randn(4, 3, 6, 6),), ("nt_xent_loss",)),
    "DirectFeedback": (lnn.DirectFeedback, (X,), ()),
    "FeedbackAlignmentConv2d": (lambda: lnn.FeedbackAlignmentConv2d(3, 4, 3), (IMAGES,), ("feedback_conv2d",)),
    "FeedbackAlignmentLinear": (lambda: lnn.FeedbackAlignmentLinear(6, 4), (X,), ("feedback_linear",)),
    "ForwardForwardLayer": (
        lambda: lnn.ForwardForwardLayer(torch.nn.Linear(6, 4)),
        (X, torch.tensor([True, False, True])),
        ("goodness_loss",),
    ),
    "InfoProUnit": (
        lambda: lnn.InfoProUnit(_conv(), 4, 5, 3),
        (IMAGES.sigmoid(), LABELS),
        ("local_cross_entropy", "supcon_loss"),
    ),
    "LLSConvBlock": (lambda: lnn.LLSConvBlock(3, 4, 3, **LLS), (IMAGES, LABELS), ("lls_block",)),
    "LLSHead": (lambda: lnn.LLSHead(_conv(), **LLS), (IMAGES, LABELS), ("lls_loss",)),
    "LLSLinearBlock": (lambda: lnn.LLSLinearBlock(6, 8, **LLS), (X, LABELS), ("lls_block",)),
    "LoKrConv2d": (lambda: lnn.LoKrConv2d(torch.nn.Conv2d(3, 4, 3), rank=2), (IMAGES,), ("lokr_conv2d",)),
    "LoKrLinear": (lambda: lnn.LoKrLinear(torch.nn.Linear(6, 4), rank=2), (X,), ("lokr_linear",)),
    "LoRAConv2d": (lambda: lnn.LoRAConv2d(torch.nn.Conv2d(3, 4, 3), rank=2), (IMAGES,), ("lokr_conv2d",)),
    "LoRALinear": (lambda: lnn.LoRALinear(torch.nn.Linear(6, 4), rank=2), (X,), ("lora_linear",)),
    "PooledClassifier": (
        lambda: lnn.PooledClassifier(_conv(), 5, pool_size=2),
        (IMAGES, LABELS),
        ("local_cross_entropy",),
    ),
    "LocalClassifier": (lambda: lnn.LocalClassifier(_conv(), 4, 5), (IMAGES, LABELS), ("local_cross_entropy",)),
    "PredSimHead": (
        lambda: lnn.PredSimHead(_conv(), (4, 4, 4), 5),
        (IMAGES, LABELS),
        ("prediction_similarity_loss", "local_cross_entropy", "similarity_matching_loss"),
    ),
    "ReconstructionHead": (lambda: lnn.ReconstructionHead(_conv(), 4, 3), (IMAGES, LABELS), ()),
    "SignSymmetricConv2d": (lambda: lnn.SignSymmetricConv2d(3, 4, 3), (IMAGES,), ("sign_symmetric_conv2d",)),
    "SignSymmetricLinear": (lambda: lnn.SignSymmetricLinear(6, 4), (X,), ("sign_symmetric_linear",)),
    **all_calls("APPLIED"),
}


def test_every_module_is_here():
    public = {name: getattr(lnn, name) for name in lnn.__all__}
    assert {n for n, v in public.items() if isinstance(v, type) and issubclass(v, torch.nn.Module)} == set(MODULES)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "compiled", "per sample", "per sample compiled"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.only(  # torch's own batch norm, which is in that unit, keeps no statistics under vmap
    where=lambda name, transform, training: (
        (name != "InfoProUnit" or not training or transform in ("grad", "jvp", "compiled"))
        # that loss has no derivative by a bias, whose rounding is all of it; what torch's interpolation does not do
        and (name != "BarlowTwinsHead" or not training or transform != "jvp")
        and (name != "ReconstructionHead" or not training or transform != "per sample compiled")
    )
)
def test_modules(name, transform, training):
    """By its parameters and its input."""
    make, (x, *rest), functions = MODULES[name]
    torch.manual_seed(0)
    module = make().train(training)
    state = dict(module.named_parameters()) | {"the input": x}

    for own in list(state)[{"compiled": -2, "per sample compiled": -1}.get(transform, 0) :]:  # compiling takes seconds
        value = state[own]

        def function(tensor, own=own):
            given = {**state, own: tensor, **{name: buffer.clone() for name, buffer in module.named_buffers()}}
            x = given.pop("the input")
            return weighted(torch.func.functional_call(module, given, (x, *rest)))

        torch._dynamo.reset()
        check(transform, function, value.detach(), functions, cuts=True)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.classifier = lnn.SignSymmetricLinear(6, 5), torch.nn.Linear(5, 4)

    def forward(self, x, target):
        h = self.layer(x)
        return self.classifier(h), LF.local_cross_entropy(h, self.classifier.weight, None, target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_export_runs_and_does_not_learn(training, strict):
    model = Model().train(training)
    exported = torch.export.export(model, (X, Y), strict=strict).module()
    outputs, expected = exported(X, Y), model(X, Y)
    torch.testing.assert_close(outputs, expected)
    for out in outputs if training else outputs[1:]:  # in evaluation the layer is torch's own
        with pytest.raises(NotImplementedError, match="an exported graph has no backward pass of"):
            out.sum().backward(retain_graph=True)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_in_evaluation_needs_no_lgkernels(strict):
    """It is loaded by programs that do not know the rule."""
    model = torch.nn.Sequential(lnn.SignSymmetricConv2d(2, 3, 2), torch.nn.Flatten(), lnn.FeedbackAlignmentLinear(3, 2))
    exported = torch.export.export(model.eval(), (randn(2, 2, 2, 2),), strict=strict)
    assert "lgkernels" not in exported.graph_module.code


def test_an_export_of_frozen_weights_has_no_seal():
    model = Model().requires_grad_(False)
    exported = torch.export.export(model, (X, Y), strict=False)
    assert "without_backward" not in exported.graph_module.code


RULES = ("usf", "frsf", "brsf", "signed_init", "fa")


def _converted(rule):
    torch.manual_seed(0)
    return lnn.convert(
        torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 4)
        ),
        rule,
        **(dict(signs="formula") if rule == "signed_init" else {}),
    )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_an_export_of_a_converted_model_in_training(rule, strict):
    """torch.export keeps the forward alone: its backward would be plain back-propagation."""
    model, x = _converted(rule), randn(5, 2, 3, 3)
    exported = torch.export.export(model.train(), (x,), strict=strict).module()
    out = exported(x)
    torch.testing.assert_close(out, model(x))
    with pytest.raises(NotImplementedError, match="an exported graph has no backward pass of"):
        out.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_samples_of_a_converted_model(rule, compiled):
    """As torch's tutorial takes them: refused by name, or what backward gives sample by sample."""
    model, x, y = _converted(rule), randn(5, 2, 3, 3), targets(5, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        out = torch.func.functional_call(model, parameters, (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(out, y.unsqueeze(0))

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    if compiled:
        per_sample = torch.compile(per_sample, backend="eager")
    refusal = r"(feedback|sign_symmetric)_(linear|conv2d) does not support torch.func"
    with pytest.raises(NotImplementedError, match=refusal):
        per_sample(parameters, x, y)


@pytest.mark.parametrize("name", MODULES)
def test_an_export_of_a_module_in_training(name):
    """It gives the same values, and the module's own gradient or none; or it is refused by name."""
    make, arguments, functions = MODULES[name]
    torch.manual_seed(0)
    module = make().train()
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    try:
        exported = torch.export.export(module, arguments, strict=False).module()
    except NotImplementedError as refused:
        assert any(str(refused).startswith(n) for n in (*functions, name))
        return
    outputs = exported(*arguments)
    for n, b in module.named_buffers():
        b.data.copy_(buffers[n])
    own = module(*arguments)
    torch.testing.assert_close(outputs, own)
    if not weighted(outputs).requires_grad:
        return
    try:
        weighted(outputs).backward()
    except NotImplementedError as refused:
        assert "an exported graph has no backward pass of" in str(refused)
        return
    weighted(own).backward()  # no function of ours plays a part
    theirs = dict(exported.named_parameters())
    for n, p in module.named_parameters():
        torch.testing.assert_close(theirs[n].grad, p.grad)
