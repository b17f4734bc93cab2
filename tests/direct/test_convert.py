"""`convert(model, "dfa")`: each unit's output has the projection of the error in place of its gradient."""

import copy
import io
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels import convert
from lgkernels.random import RandomFeedback
from lgkernels.training import DirectTrainer
from tests.support.tiny_models import CAUSAL, OF_TOKENS, batch, logits, loss_of, tiny
from tests.support.tolerances import assert_relative

NAMES = ["gpt2", "llama", "bert", "vit", "timm_vit", "eva", "convnext", "swin"]


def mlp(depth=4, classes=3):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(8, classes))


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def places(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, lnn.DirectFeedback)}


def data(rows=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 8, generator=generator), torch.arange(rows) % 3


def test_it_is_the_trainers_rule():
    """The same gradients as DirectTrainer's, whose blocks and matrices are made by hand."""
    model = mlp()
    x, target = data()
    blocks = []
    for i, layer in enumerate(copy.deepcopy(model)):
        blocks.append(layer)
        if i in (1, 2, 3):
            blocks.append(lnn.DirectFeedback(seed=7, stream=zlib.crc32(str(i).encode())))
    seen = []

    class Kept(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    trainer = DirectTrainer(blocks, lambda parameters: Kept(parameters, 1.0))
    trainer.step(x, target)
    convert(model, "dfa", units=[2, 3, 4], seed=7, verbose=False)
    F.cross_entropy(model(x), target).backward()
    mine = sorted(g.flatten().tolist() for g in grads(model).values())
    theirs = sorted(g.flatten().tolist() for g in seen)
    for a, b in zip(mine, theirs, strict=True):
        assert_relative("", torch.tensor(a), torch.tensor(b), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_unit_by_its_own_vjp(name):
    """By hand: the error of the output, projected by the matrices as tensors, through each unit alone."""
    model, (x, target) = tiny(name).eval(), batch(name)
    twin = copy.deepcopy(model)
    convert(model, "dfa", units=2, verbose=False)
    loss = loss_of(model, name, x, target)
    assert torch.equal(loss, loss_of(twin, name, x, target))  # the forward is the model's
    loss.backward()
    ((end, place),) = places(model).items()
    end = end.rpartition(".")[0]
    caught = {}

    def cut(module, arguments, out):
        h = out if isinstance(out, torch.Tensor) else out[0]
        caught["h"] = h
        detached = h.detach()
        return detached if isinstance(out, torch.Tensor) else (detached, *out[1:])

    twin.get_submodule(end).register_forward_hook(cut)
    out = logits(twin(x))
    out.retain_grad()
    if name in CAUSAL:
        F.cross_entropy(out[:, :-1].flatten(0, 1), target[:, 1:].flatten()).backward()
    else:
        F.cross_entropy(out, target).backward()
    h, error = caught["h"], out.grad
    rest = h.shape[error.dim() - 1 :]
    matrix = place.matrix(error.shape[-1], rest).flatten(1)
    h.backward((error.flatten(0, -2) @ matrix).view(h.shape))
    expected = grads(twin)
    assert grads(model).keys() == expected.keys()
    for key, value in grads(model).items():
        assert_relative("", value, expected[key], 1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "timm_vit"])
def test_it_learns(name):
    model, (x, target) = convert(tiny(name), "dfa", units=4, verbose=False), batch(name)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(40):
        loss = loss_of(model, name, x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_loss_inside_of_the_model():
    """Models of transformers take labels."""
    x, target = batch("gpt2")
    inside, outside = (convert(tiny("gpt2").eval(), "dfa", units=2, verbose=False) for _ in range(2))
    inside(x, labels=target).loss.backward()
    loss_of(outside, "gpt2", x, target).backward()
    for key, value in grads(inside).items():
        assert_relative("", value, grads(outside)[key], 1e-5)
    model = convert(tiny("bert"), "dfa", units=2, verbose=False)
    model(batch("bert")[0], labels=batch("bert")[1]).loss.backward()
    assert grads(model)
    model = convert(tiny("bert"), "dfa", units=2, output="", verbose=False)
    with pytest.raises(ValueError, match="output must name the module of BertForSequenceClassification that gives"):
        model(batch("bert")[0], labels=batch("bert")[1])


def test_nothing_is_stored():
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    convert(model, "dfa", verbose=False)
    assert len(places(model)) == 3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and len(before) == len(
        model.state_dict()
    )
    states = [m for m in model.modules() if isinstance(m, RandomFeedback)]
    assert [sum(b.numel() * b.element_size() for b in m.buffers()) for m in states] == [24] * 3
    assert len({m.state[1].item() for m in states}) == 3  # a stream each
    assert len(lnn.feedback_state(model)["feedback"]) == 3


def test_between_units_nothing_flows():
    """With an error of zeros for all that is not the head, units get nothing, whatever the loss."""
    model = convert(mlp(), "dfa", init=1e-30, verbose=False)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    found = grads(model)
    assert all(g.abs().max() < 1e-25 for name, g in found.items() if name[0] in "0123")
    assert found["4.weight"].abs().max() > 1e-3


def test_one_projection_at_a_time():
    """Each is made when its unit's backward begins: never two of them at once."""
    model, order = convert(mlp(), "dfa", verbose=False), []
    for place in places(model).values():
        place.signal = lambda e, h, p=place: order.append("signal") or type(p).signal(p, e, h)
    out = model(data()[0])
    for i in range(4):
        model[i][0].weight.register_hook(lambda g, i=i: order.append(i))
    F.cross_entropy(out, data()[1]).backward()
    assert order == ["signal", 3, "signal", 2, "signal", 1, "signal", 0]


def test_back_to_bp():
    model, (x, target) = tiny("gpt2").eval(), batch("gpt2")
    twin = copy.deepcopy(model)
    convert(model, "dfa", verbose=False)
    convert(model, "dfa", units=2, seed=3, verbose=False)
    assert len(places(model)) == 1
    convert(model, "bp", verbose=False)
    assert not places(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for m in (model, twin):
        loss_of(m, "gpt2", x, target).backward()
    for key, value in grads(model).items():
        assert torch.equal(value, grads(twin)[key])


def test_under_a_feedback_rule_inside_of_the_units():
    model = convert(mlp(), "usf", verbose=False)
    convert(model, "dfa", units=2, verbose=False)
    assert isinstance(model[0][0], lnn.SignSymmetricLinear)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert len(grads(model)) == 10


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Layers that run again in the backward give the same gradients; torch's older kind keeps no graph of a layer."""
    x, target = batch("llama")
    plain, saving = (convert(tiny("llama"), "dfa", units=2, verbose=False) for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(plain, "llama", x, target).backward()
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss_of(saving, "llama", x, target)
        return
    loss_of(saving, "llama", x, target).backward()
    for key, value in grads(plain).items():
        assert_relative("", grads(saving)[key], value, 1e-5)


def test_two_forwards_before_a_backward():
    one, two = (convert(mlp(), "dfa", verbose=False) for _ in range(2))
    (x, y), half = data(), 3
    losses = [F.cross_entropy(one(x[:half]), y[:half]), F.cross_entropy(one(x[half:]), y[half:])]
    sum(losses).div(2).backward()
    F.cross_entropy(two(x), y).backward()
    for key, value in grads(one).items():
        assert_relative("", value, grads(two)[key], 1e-5)


def test_a_model_that_is_copied_saved_and_frozen():
    x, y = data()
    model = convert(mlp(), "dfa", verbose=False)
    F.cross_entropy(model(x), y).backward()
    expected = grads(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        assert all(torch.equal(v, expected[k]) for k, v in grads(twin).items())
    model.zero_grad()
    model[1].requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(v, expected[k]) for k, v in grads(model).items()) and "1.0.weight" not in grads(model)
    with torch.no_grad():
        assert model(x).shape == (6, 3)


def test_no_second_derivative():
    model = convert(mlp(), "dfa", verbose=False)
    x = data()[0].requires_grad_()
    loss = F.cross_entropy(model(x), data()[1])
    (g,) = torch.autograd.grad(loss, model[4].weight, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"convert\(model, 'dfa'\) has no second derivative"):
        g.sum().backward()


class Bypassing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.head.weight)


def test_an_output_that_does_not_run():
    model = convert(Bypassing(), "dfa", output="head", verbose=False)
    with pytest.raises(RuntimeError, match="Bypassing is over and that of 'head' has not run after the units"):
        model(data()[0])
    model = convert(Bypassing(), "dfa", verbose=False)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    assert len(grads(model)) == 5


def test_a_loss_of_a_part_of_the_model():
    """The units below the last would get no gradient, in silence."""
    model, (x, _) = convert(tiny("bert"), "dfa", units=2, verbose=False), batch("bert")
    part = model.get_submodule("bert")
    loss = part(x).last_hidden_state.sum()
    with pytest.raises(RuntimeError, match="the loss must be taken of the output of 'classifier', which has not run"):
        loss.backward()
    out = model(x, output_hidden_states=True)  # the model whole: its hidden states may have a loss too
    (out.logits.square().sum() + out.hidden_states[-1].square().sum()).backward()
    assert any(".layer.0." in name for name in grads(model))


@pytest.mark.parametrize("graph", [False, True])
def test_a_pass_that_does_not_come_to_its_end(graph):
    """The next one is not disturbed by what it has left behind."""
    (x, target), trees = batch("gpt2"), []
    for partial in (False, True):
        model = convert(tiny("gpt2").eval(), "dfa", units=2, verbose=False)
        with torch.set_grad_enabled(graph):
            if partial:
                model.transformer(x)
        loss_of(model, "gpt2", x, target).backward()
        trees.append(grads(model))
    assert trees[0].keys() == trees[1].keys()
    assert all(torch.equal(value, trees[1][name]) for name, value in trees[0].items())


class Staged(nn.Module):
    """Lists of layers with a layer of another kind between them, as torchvision's ConvNeXt and Swin have."""

    def __init__(self):
        super().__init__()
        stages = [nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))) for _ in range(2)]
        self.features, self.head = nn.Sequential(stages[0], nn.Linear(8, 8), stages[1]), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.features(x))


def test_a_layer_between_units():
    """It would get no gradient, in silence."""
    x, target = data()
    model = Staged()
    with pytest.raises(
        ValueError, match="path must name a list that holds .*, got '1' of 'features' .*path='features'"
    ):
        convert(model, "dfa", verbose=False)
    assert not places(model)
    for given in (dict(path="features"), dict(units=[1]), dict(units=[3])):
        convert(model, "dfa", verbose=False, **given)
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        assert grads(model).keys() == dict(model.named_parameters()).keys()


def test_the_summary(capsys):
    convert(tiny("gpt2"), "dfa", units=[1, 3])
    assert capsys.readouterr().out.splitlines() == [
        "dfa: 3 units, the error is that of lm_head's output",
        "  transformer.h.0  init='nokland', law='uniform'",
        "  transformer.h.1 to transformer.h.2  init='nokland', law='uniform'",
        "  transformer.h.3  its own gradient",
    ]


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(units=6), ValueError, "units must be at most 5, the layers of the model, got 6"),
        (dict(units=[3, 2]), ValueError, "units must be increasing layer numbers in [1, 4], got [3, 2]"),
        (dict(units=True), TypeError, "units must be an int, got bool"),
        (dict(path="6"), ValueError, "path must name a list of layers of the model, got '6'; its lists"),
        (dict(output="head"), ValueError, "output must name modules of the model, got 'head', which matches none"),
        (dict(output="1.0"), ValueError, "output must name a module behind the layers, got '1.0', which is in one"),
        (dict(output=1), TypeError, "output must be the name of a module, got int"),
        (dict(init="big"), ValueError, "init must be one of 'nokland', 'kaiming', 'lighton', 'lls', got 'big'"),
        (dict(law="big"), ValueError, "law must be one of"),
        (dict(scale=1), TypeError, "options of rule='dfa' must be among units, path, output, init, law, impl, "),
        (dict(include="0"), ValueError, "include, exclude and last_layer must be left out with rule='dfa'"),
        (dict(model=nn.Linear(2, 2)), ValueError, "model must have a list of at least two layers, got Linear with 0"),
    ],
)
def test_bad_arguments(given, error, message):
    model = mlp()
    with pytest.raises(error) as caught:
        convert(**{"model": model, "rule": "dfa", "verbose": False, **given})
    assert str(caught.value).startswith(message), str(caught.value)
    assert not places(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_transforms_are_refused_by_name(transform):
    model, (x, _) = convert(mlp(), "dfa", verbose=False), data()
    with pytest.raises(NotImplementedError, match=r"convert\(model, 'dfa'\) does not support torch.func"):
        transform(model)(x)


def test_dense_predictions_are_refused():
    model = convert(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)), "dfa", verbose=False)
    with pytest.raises(ValueError, match=r"output must give \(B, C\), or \(B, T, C\) for tokens, got a "):
        model(torch.ones(2, 1, 3, 3))


assert set(OF_TOKENS) <= set(NAMES)
