"""Models with a list of layers, cut into units: transformers of all kinds, ConvNeXt and Swin."""

import copy

import pytest
import torch
from torch import nn

import lgkernels
import lgkernels.nn as lnn
from lgkernels.__main__ import main
from lgkernels.recipes.measure import peak_memory
from lgkernels.training import BlockwiseTrainer, auxiliary_nets, partition, recognition, split_blocks
from lgkernels.training.attention import counted_attention
from tests.support import tiny_models
from tests.support.tiny_models import CAUSAL, CLASSES, OF_TOKENS, VOCABULARY, WIDTH, batch, logits, loss_of, tiny
from tests.support.tolerances import assert_relative

NAMES = list(tiny_models.MODELS)


def in_turn(units, x):
    for unit in units:
        x = unit(x)
    return x


@pytest.mark.parametrize("name", NAMES)
def test_units_are_the_model(name):
    """In both modes, whether model or units are switched, with all gradients; every parameter is in a unit."""
    model, (x, _) = tiny(name), batch(name)
    units = nn.ModuleList(split_blocks(model, 3, input=x))
    assert {id(p) for p in model.parameters()} == {id(p) for unit in units for p in unit.parameters()}
    for switched in (model, units):
        for mode in (False, True):
            model.train(not mode)
            switched.train(mode)
            outs, grads = [], []
            for run in (lambda: in_turn(units, x), lambda: logits(model.train(mode)(x))):
                torch.manual_seed(1)
                outs.append(run())
                model.zero_grad()
                outs[-1].square().sum().backward()
                grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            assert_relative(name, *outs, 1e-5)  # a cache of keys and values lays them out otherwise
            assert len(grads[0]) == len(grads[1]) > 10
            assert all(torch.allclose(a, b, 1e-4, 1e-6) for a, b in zip(*grads))


@pytest.mark.parametrize(
    "name, parts", [("gpt2", 6), ("llama", 6), ("bert", 6), ("vit", 6), ("convnext", 11), ("swin", 6)]
)
def test_parts(name, parts):
    """What comes before, the layers (of all stages), what comes behind."""
    layers = {"convnext": 9}.get(name, 4)
    assert len(recognition.chain(tiny(name), batch(name)[0])) == layers + 2


def test_without_an_example():
    for name in ("gpt2", "vit", "timm_vit"):
        assert len(split_blocks(tiny(name), 2, balance="parts")) == 2


@pytest.mark.parametrize("name, path", [("gpt2", "transformer.h"), ("llama", "model.layers"), ("swin", "layers")])
def test_a_path(name, path):
    model, (x, _) = tiny(name).eval(), batch(name)
    units = split_blocks(model, [2], path=path, input=x)
    layers = model.get_submodule(path)
    assert any(m is layers[0] for m in units[0].modules()) and any(m is layers[1] for m in units[1].modules())
    assert torch.equal(in_turn(units, x), logits(model(x)))


def test_a_mask_of_the_callers():
    """Units take a mapping of the model's arguments."""
    model, (x, _) = tiny("bert").eval(), batch("bert")
    given = {"input_ids": x, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [3], [1]])).long()}
    units = split_blocks(model, 3, input=x)
    assert torch.equal(in_turn(units, given), model(**given).logits)
    assert not torch.equal(in_turn(units, given), model(x).logits)


def head(name, unit, channels):
    if name in CAUSAL:
        return lnn.LocalClassifier(unit, channels, VOCABULARY, shift=True)
    return lnn.LocalClassifier(unit, channels, CLASSES)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "timm_vit"])
def test_units_learn(name):
    model, (x, target) = tiny(name), batch(name)
    units = split_blocks(model, 3, input=x)
    blocks = [head(name, unit, WIDTH) for unit in units[:-1]]
    blocks.append(lnn.ClassifierBlock(units[-1], shift=name in CAUSAL))
    trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01))
    first = trainer.step(x, target)
    for _ in range(20):
        last = trainer.step(x, target)
    assert bool((last < 0.7 * first).all()), (first, last)
    before = loss_of(tiny(name).eval(), name, x, target)
    assert loss_of(model.eval(), name, x, target) < 0.7 * before  # the model itself has learned
    assert trainer.predict(x).shape[-1] in (VOCABULARY, CLASSES)


def test_units_learn_from_padded_text():
    model, (x, target) = tiny("bert"), batch("bert")
    given = {"input_ids": x, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [3], [1]])).long()}
    units = split_blocks(model, 3, input=x)
    blocks = [
        lnn.LocalClassifier(units[0], WIDTH, CLASSES),
        lnn.LLSHead(units[1], num_classes=CLASSES, pool_size=2),
        lnn.ClassifierBlock(units[2]),
    ]
    trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01))
    first = trainer.step(given, target)
    for _ in range(20):
        last = trainer.step(given, target)
    assert bool((last < first).all()), (first, last)
    model.eval()
    assert torch.equal(trainer.eval().predict(given), model(**given).logits)
    with pytest.raises(TypeError, match="x must be a torch.Tensor, or a mapping that holds one, got a dict of"):
        trainer.train().step({"input_ids": x.tolist()}, target)
    heads = BlockwiseTrainer([lnn.LLSHead(units[0], num_classes=CLASSES, pool_size=2)], torch.optim.Adam)
    with pytest.raises(ValueError, match=r"target must have shape \(4,\)"):
        heads.step(given, target[:2])


@pytest.mark.parametrize("kind", ["reconstruction", "barlow", "aux"])
def test_other_local_losses(kind):
    name = "gpt2" if kind != "barlow" else "vit"
    model, (x, target) = tiny(name), batch(name)
    units = split_blocks(model, 3, input=x)
    blocks = [units[0].requires_grad_(False)]  # whose features stay as they are
    if kind == "reconstruction":
        blocks.append(lnn.ReconstructionHead(units[1], WIDTH, WIDTH))
    elif kind == "barlow":
        blocks.append(lnn.BarlowTwinsHead(units[1], WIDTH, dim=4))
    else:
        units[0].requires_grad_(True)
        nets = auxiliary_nets(units, 2)
        assert [len(net) for net in nets] == [2, 1]
        taken = {id(p) for p in model.parameters()}
        assert not any(id(p) in taken for net in nets for p in net.parameters())
        blocks = [
            lnn.LocalClassifier(u, WIDTH, VOCABULARY, shift=True, aux=net) for u, net in zip(units, nets, strict=False)
        ]
    blocks.append(lnn.ClassifierBlock(units[-1], shift=name in CAUSAL))
    trainer = BlockwiseTrainer(blocks, lambda parameters: torch.optim.Adam(parameters, 0.01))
    first = trainer.step(x, target)
    for _ in range(10):
        last = trainer.step(x, target)
    assert bool((last < first).all()), (first, last)


def test_units_out_of_order():
    x = batch("llama")[0]
    units = split_blocks(tiny("llama"), 3, input=x)
    with pytest.raises(RuntimeError, match="takes the batch that the first unit took just before it .*in order"):
        units[1](torch.randn(4, 8, WIDTH))
    h = units[0](x)
    with pytest.raises(RuntimeError, match=r"\(4 rows, for masks and positions\), got 2 rows"):
        units[1](h[:2])


def test_a_copy_of_the_units():
    x = batch("gpt2")[0]
    units = nn.ModuleList(split_blocks(tiny("gpt2").eval(), 3, input=x))
    expected = in_turn(units, x)
    twin = copy.deepcopy(units)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in units.parameters()}
    assert torch.equal(in_turn(twin, x), expected)


class Looped(nn.Module):
    """A stack of layers whose forward is not them in turn; `kind` says in what."""

    def __init__(self, kind=""):
        super().__init__()
        self.kind = kind
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        h = first = self.embed(x) * self.scale
        for layer in self.layers if self.kind != "twice" else [*self.layers, self.layers[0]]:
            h = layer(h) + (h if self.kind == "residual" else 0)
            h = self.norm(h) if self.kind == "between" else h
        h = h + first if self.kind == "skip" else h
        h = nn.functional.dropout(h, 0.5, self.training) if self.kind == "dropout" else h
        return self.head(self.norm(h)) + self.shift


@pytest.mark.parametrize(
    "kind, message",
    [
        ("residual", "computes something else than their parts"),
        ("skip", "computes something else than their parts"),
        ("between", "other modules run between its layers"),
        ("twice", "are not called once each"),
    ],
)
def test_what_is_not_its_layers_in_turn(kind, message):
    with pytest.raises(
        TypeError, match=f"has a list of layers, layers.0 to layers.2.*{message}.*by path, or write it as an nn.Seq"
    ):
        split_blocks(Looped(kind), 2, input=torch.empty(2, 6))


def test_a_model_of_ones_own():
    """A parameter belongs to the unit that makes use of it; a dropout that is no module follows the units' mode."""
    model, x = Looped("dropout"), torch.randn(4, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    units = nn.ModuleList(split_blocks(model, 2, input=x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert any(p is model.scale for p in units[0].parameters()) and any(p is model.shift for p in units[1].parameters())
    assert not any(p is model.shift for p in units[0].parameters())
    units.eval()
    assert torch.equal(in_turn(units, x), model.eval()(x))
    units.train()
    torch.manual_seed(0)
    mine = in_turn(units, x)
    torch.manual_seed(0)
    assert torch.equal(mine, model.train()(x)) and not torch.equal(mine, model.eval()(x))
    model.double()
    assert torch.equal(in_turn(units.eval(), x.double()), model(x.double()))


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("layer", ValueError, "path must name a list of layers of the model, got 'layer'; near it: layers"),
        ("head", ValueError, "path must name a list of layers, got 'head', a Linear"),
        (3, TypeError, "path must be a str or an iterable of them, got int"),
    ],
)
def test_bad_paths(path, error, message):
    with pytest.raises(error) as caught:
        split_blocks(Looped(), 2, input=torch.empty(2, 6), path=path)
    assert str(caught.value).startswith(message)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "timm_vit"])
def test_the_plan_is_what_a_step_takes(name):
    """Within 5 % of the measured peak of a real step of back-propagation on a CPU."""
    # a dropout inside attention has no fused kernel on a CPU
    model = tiny(name, **(dict(attn_pdrop=0.0) if name == "gpt2" else {}))
    if name in OF_TOKENS:
        model.config.use_cache = False
        x = torch.randint(1, VOCABULARY, (32, 64))
        target = x
    else:
        x, target = torch.randn(128, 3, 16, 16), torch.arange(128) % CLASSES
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        loss_of(model, name, x, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # momentum
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = 2 * weights + sum(b.numel() * b.element_size() for b in model.buffers()) + x.numel() * x.element_size()
    measured = there + peak_memory(step, torch.device("cpu"))
    predicted = lgkernels.plan(model, x).rows[0].peak
    assert abs(predicted - measured) <= 0.05 * measured, f"{predicted / 1e6:.2f} MB, measured {measured / 1e6:.2f}"


def test_the_plan_of_tokens(capsys, tmp_path):
    model = tiny("gpt2")
    rows = {row.name: row for row in lgkernels.plan(model, (8, 16)).rows}
    assert rows["local, 6 units"].peak < rows["BP"].peak
    model.config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--seq", "16", "--batch", "8"]) == 0
    assert "BP, checkpointed" in capsys.readouterr().out
    assert main(["plan", "--model", "gpt2x", "--seq", "16"]) == 2
    assert "--model must be a kind of language model of transformers" in capsys.readouterr().out
    assert main(["plan", "--model", str(tmp_path), "--seq", "0"]) == 2


def test_a_large_model_is_tried_with_little_memory(monkeypatch):
    """Tensors of one shape then have the same random values."""
    made = []
    monkeypatch.setattr(recognition, "LARGE", 1)
    monkeypatch.setattr(recognition, "_random_like", lambda t, f=recognition._random_like: made.append(t.shape) or f(t))
    units = split_blocks(tiny("llama"), 2, input=batch("llama")[0])
    assert len(units) == 2 and made.count(torch.Size([WIDTH, WIDTH])) == 1


def test_saved_bytes_of_layers():
    """The meta device's count is that of real tensors."""
    model, (x, _) = tiny("vit"), batch("vit")
    make = recognition.maker(model, x)
    real = partition.saved_bytes(make(model), x)[0]
    with counted_attention("flash"):
        meta = partition.saved_bytes(make(partition.to_meta(model)), x.to("meta"))[0]
    assert meta == pytest.approx(real, rel=0.05)
