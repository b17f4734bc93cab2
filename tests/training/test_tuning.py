"""The rules that tune a network unit by unit, plain and BP-modified, and what they are compared with."""

import json

import pytest
import torch
from torch import nn

import lgkernels.__main__ as command
import lgkernels.nn as lnn
from lgkernels.optim import OffsetSGD
from lgkernels.recipes import checkpoint, data, loop, networks, optimizers, rules, train, weights
from lgkernels.recipes import settings as settings_module
from lgkernels.recipes.rules import local_loss, offset
from lgkernels.training import BackpropTrainer, BlockwiseTrainer, partition, refresh_trainer
from tests.support.problems import randn, targets
from tests.support.tolerances import assert_relative

for needed in train.NEEDED:
    pytest.importorskip(needed)


class Silent:
    def __init__(self, run):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def advance(self, run):
        pass


def settings(**changes):
    return settings_module.from_flat(
        {
            "rule": "loco",
            "device": "cpu",
            "augment": "none",
            "limit": 64,
            "batch_size": 16,
            "epochs": 1,
            "model": "resnet-small",
            "optimizer": "sgd",
            "offset_batch": 32,
            **changes,
        }
    )


def dataset(s):
    return data.load("fashion-mnist", None, "none").truncated(s.limit)


def local_blocks(rule, model, x, num_classes, **options):
    record = rules.get(rule)
    task = rules.Task(record, record.options(**options), num_classes=num_classes, network=model, example=x)
    return record.build(task)


def small(seed=0):
    """conv parts of 6 and 8 channels, and a classifier, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        networks.Part(nn.Conv2d(1, 6, 3, 2, 1), nn.Tanh()),
        networks.Part(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh()),
        networks.Part(nn.Conv2d(8, 8, 3, 1, 1), nn.Tanh()),
        networks.Part(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).double()


def batch(size=12):
    return randn(size, 1, 12, 12, dtype=torch.float64), targets(size, 4)


@pytest.mark.parametrize("rule", [rule.name for rule in local_loss.RULES])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_two_ends_of_the_offset(rule, scale):
    """alpha 0: the plain rule, bit for bit. alpha 1, refreshed at every step on the batch itself, without momentum: the
    network's own parameters follow back-propagation (of the network with the rule's normalisations)."""
    x, y = batch()
    make = lambda: [b.double() for b in local_blocks(rule, small(), x, 4, contrast="supcon")]  # noqa: E731
    trainer = BlockwiseTrainer(make(), lambda p: OffsetSGD(p, 0.1, offset_scale=scale))
    if scale:
        rival = BackpropTrainer(make(), lambda p: torch.optim.SGD(p, 0.1))
    else:
        rival = BlockwiseTrainer(make(), lambda p: torch.optim.SGD(p, 0.1))
    for i in range(3):
        torch.manual_seed(i)  # Forward-Forward's wrong labels: the refresh and the step draw the same
        refresh_trainer(trainer, (x, y), bp_chunk=6, local_chunk=12)
        trainer.step(x, y)
        torch.manual_seed(i)
        rival.step(x, y)
    for ours, theirs in zip(trainer.blocks, rival.blocks):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if not scale or name.startswith(("unit", "block", "module")):
                assert_relative(name, p, q, 1e-9)


def test_forward_forward_unit():
    """Three versions of a batch: right label, wrong label, none; normalised from the second unit on; the classifier and
    a call without target see the last."""
    x, y = batch()
    model = small()
    first, second, *_, last = local_blocks("forward-forward", model, x, 4)
    torch.manual_seed(0)
    out, loss = first(x, y)
    assert len(out) == 36 and torch.equal(out[24:], model[0](x))
    stacked = first._stacked(x, y)
    assert (stacked[:24, 0, 0, :4].argmax(1)[:12] == y).all() and (stacked[12:24, 0, 0, :4].argmax(1) != y).all()
    goodness = out[:24].square().flatten(1).mean(1) * 2 / first.threshold
    sign = torch.ones(24, dtype=torch.float64)
    sign[12:] = -1
    assert_relative("loss", loss, nn.functional.softplus(sign * (2 - goodness)).mean(), 1e-5)
    out, _ = second(out, y)
    normalized = second._normalized(model[0](x))
    rms = normalized.square().mean((1, 2, 3)).sqrt()
    assert_relative("rms", rms, second.scale.double().expand(12), 1e-5)
    assert torch.equal(second(model[0](x)), model[1](normalized)) and torch.equal(out[24:], second(model[0](x)))
    logits, loss = last(randn(36, 8, 3, 3, dtype=torch.float64), y)
    assert logits.shape == (12, 4)


def test_locos_overlap():
    """The first part of the next unit learns from two losses: its gradient is their sum, and it steps once."""
    x, y = batch()
    model = small()
    blocks = [b.double() for b in local_blocks("loco", model, x, 4, contrast="supcon")]
    assert [len(b.ahead) for b in blocks[:-1]] == [1, 1, 0] and blocks[0].ahead[0] is blocks[1].unit[0]
    shared = model[1][0].weight
    h, lower = blocks[0](x, y)
    _, upper = blocks[1](h, y)
    expected = sum(torch.autograd.grad(loss, shared)[0] for loss in (lower, upper))
    before = shared.detach().clone()
    trainer = BlockwiseTrainer(blocks, lambda p: torch.optim.SGD(p, 1.0))
    trainer.step(x, y)
    assert_relative("sum", before - shared.detach(), expected, 1e-9)
    assert sum(shared is p for group in trainer.parameter_groups for p in group) == 1
    assert all(len(b.ahead) == 0 for b in local_blocks("gim", model, x, 4)[:-1])


@pytest.mark.parametrize("rule", ["bp-accumulate", "bp-checkpoint"])
def test_rivals_are_back_propagation(rule):
    s = settings(pretrain=1)
    start, results = weights.network("resnet-small", 1, 10).state_dict(), []
    for name in (rule, "bp"):
        trainer = loop.make_trainer(s, rules.get(name), dataset(s), start)
        for i in range(2):
            trainer.step(randn(16, 1, 28, 28, seed=i), targets(16, 10, seed=i))
        results.append([p.detach() for b in trainer.blocks for p in b.parameters()])
        assert trainer.output.shape == (16, 10)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_command(tmp_path, capsys):
    """Pre-trains once, tunes by several rules from the same weights, and shows what a refresh costs."""
    arguments = [
        "--model",
        "resnet-small",
        "--limit",
        "64",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--pretrain",
        "1",
        "--offset-batch",
        "16",
        "--period",
        "2",
        "--out",
        str(tmp_path),
        "--name",
        "r",
        "--batch-norm",
        "batch",
    ]
    assert (
        command.main(["train", "--rule", "loco-bpm", "--compare", "forward-forward", "bp-checkpoint", *arguments]) == 0
    )
    out = capsys.readouterr().out
    assert "pre-training on 5 classes, epoch 1/1" in out and (tmp_path / "r" / "pretrained.safetensors").exists()
    results = json.loads((tmp_path / "r" / "results.json").read_text())["results"]
    assert list(results) == ["loco-bpm", "forward-forward", "bp-checkpoint"]
    assert 0 < results["loco-bpm"]["refresh_overhead_formula"] and 0 < results["loco-bpm"]["refresh_overhead"]
    assert "refresh_overhead" not in results["forward-forward"]
    title = out[out.index("rule  ") :].splitlines()[0].split()
    assert title[-3:] == ["refresh", "formula", "training"] and "signal" not in title
    assert all(r["lr"] == weights.TUNING.rates["sgd"] for r in results.values())


def test_formula():
    s, options = settings(batch_size=64), offset.OffsetOptions(offset_batch=320)
    assert offset.formula(s, options, 3.0, 3.0, 50_000) == pytest.approx(2 * 320 / (781 * 64))


def test_resume_is_bit_exact(tmp_path):
    """Interrupted between two refreshes: offsets and random labels go on."""
    s = settings(period=3, epochs=2)
    whole = loop.Run(s, "forward-forward-bpm", dataset(s), tmp_path / "whole")
    list(whole.train(Silent, lambda: False))
    first = loop.Run(s, "forward-forward-bpm", dataset(s), tmp_path / "part")
    with pytest.raises(loop.Interrupted):
        list(first.train(Silent, lambda: first.trainer.steps >= 5))
    torch.manual_seed(99)
    second = loop.Run(s, "forward-forward-bpm", dataset(s), tmp_path / "part")
    second.load_state_dict(checkpoint.load(second.path))
    list(second.train(Silent, lambda: False))
    assert all(torch.equal(whole.weights[k], second.weights[k]) for k in whole.weights)


@pytest.mark.parametrize("model, adapter", [("resnet-small", "lokr"), ("vit-small", "lora")])
def test_adapters(model, adapter):
    """Only factors and the classifier learn, only they have offsets."""
    s = settings(model=model, adapter=adapter, units=3)
    run = loop.Run(s, "predsim-bpm", dataset(s), None)
    order = torch.arange(64)
    assert offset.due(run)
    assert [o.param_groups[0]["offset_scale"] for o in run.trainer.optimizers] == [
        1,
        1,
        0,
    ]  # the last has the global loss
    before = {id(p): p.detach().clone() for b in run.trainer.blocks for p in b.parameters()}
    for i in range(2):
        offset.refresh(run, order, 0)
        run.trainer.step(*run.batch_at(order, i))
    names = [name for b in run.trainer.blocks for name, p in b.named_parameters() if not torch.equal(p, before[id(p)])]
    ours = [n for n in names if n.startswith(("block", "module"))]
    factors = {"lokr": ("w1", "w2", "w2_a", "w2_b"), "lora": ("a", "b")}[adapter]
    assert ours and all(
        n.split(".")[-1] in factors for n in ours if ".base." not in n and not n.endswith(("weight", "bias"))
    )
    frozen = [n for n in ours if n.endswith(("weight", "bias"))]
    assert len(frozen) == 2  # the classifier's
    offsets = {id(p) for o in run.trainer.optimizers for p, _ in o.offsets()}
    assert offsets and offsets <= {id(p) for b in run.trainer.blocks for p in b.parameters() if p.requires_grad}


def test_names_of_torchvision_and_timm():
    """Files under those names fit our networks. (The functions: test_weights_of_torchvision.)"""
    n = networks.vit(3, 7, image=32, patch=16, dim=8, depth=2, heads=2)
    mine = nn.Sequential(*n[:-2], networks.Part(*n[-2:]))
    timm = {
        "cls_token": "0.cls_token",
        "pos_embed": "0.pos_embed",
        "patch_embed.proj.weight": "0.proj.weight",
        "blocks.1.norm1.bias": "2.norm1.bias",
        "blocks.0.attn.qkv.weight": "1.qkv.weight",
        "blocks.0.attn.proj.bias": "1.proj.bias",
        "blocks.1.mlp.fc2.weight": "2.fc2.weight",
        "norm.weight": "3.weight",
        "head.weight": "4.1.weight",
    }
    torchvision = {
        "class_token": "0.cls_token",
        "encoder.pos_embedding": "0.pos_embed",
        "conv_proj.weight": "0.proj.weight",
        "encoder.layers.encoder_layer_1.ln_1.bias": "2.norm1.bias",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": "1.qkv.weight",
        "encoder.layers.encoder_layer_0.self_attention.out_proj.bias": "1.proj.bias",
        "encoder.layers.encoder_layer_1.mlp.3.weight": "2.fc2.weight",
        "encoder.ln.weight": "3.weight",
        "heads.head.weight": "4.1.weight",
    }
    resnet = {
        "conv1.weight": "0.0.weight",
        "bn1.running_mean": "0.1.running_mean",
        "layer1.0.conv1.weight": "1.conv1.weight",
        "layer1.1.bn2.bias": "2.bn2.bias",
        "layer2.0.downsample.1.weight": "3.downsample.1.weight",
        "fc.weight": "9.2.weight",
    }
    for names, head in ((timm, "4.1"), (torchvision, "4.1"), (resnet, "9.2")):
        assert list(weights.translated(dict.fromkeys(names, 0), head)) == list(names.values())
    assert weights.head(mine) == "4.1" and set(timm.values()) <= set(mine.state_dict())
    with pytest.raises(checkpoint.CheckpointError, match="expected a tensor 0.cls_token of shape .1, 1, 8., got none"):
        weights.load(mine, {})


@pytest.mark.parametrize("kind, size", [("resnet50", 64), ("vit-b-16", 224)])
def test_weights_of_torchvision(tmp_path, kind, size):
    """The published networks, as functions: torchvision's file gives our network torchvision's output."""
    from lgkernels.core import optional

    try:
        models = optional.torchvision().models
    except ImportError as error:
        pytest.skip(f"torchvision is not there ({error})")
    torch.manual_seed(0)
    theirs = (models.resnet50(num_classes=5) if kind == "resnet50" else models.vit_b_16(num_classes=5)).eval()
    for p in theirs.parameters():
        if p.dim() == 2 and not p.any():
            nn.init.normal_(p)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    mine = weights.network(kind, 3, 5).eval()
    weights.load(mine, weights.read(tmp_path / "w.pth"))
    head = theirs.fc if kind == "resnet50" else theirs.heads.head
    mine.get_submodule(weights.head(mine)).load_state_dict(head.state_dict())
    x = randn(1, 3, size, size)
    with torch.no_grad():
        assert_relative("logits", mine(x), theirs(x), 1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rule", "lls", "--pretrain", "1"], "--pretrain is for bp and forward-forward, "),
        (["--rule", "loco", "--pretrain", "1", "--weights", "x"], "--pretrain and --weights exclude each other"),
        (["--rule", "loco-bpm", "--optimizer", "adamw-schedule-free"], "takes no offsets (loco-bpm): use sgd"),
        (["--rule", "loco", "--contrast", "x"], "--contrast must be one of: nt-xent, supcon, got 'x'"),
        (["--rule", "loco", "--adapter", "x"], "--adapter must be one of: lora, lokr, got 'x'"),
        (
            ["--rule", "bp-accumulate", "--batch-size", "31"],
            "--batch-size must be divisible by a number from 2 to 8 for bp-accumulate, got 31",
        ),
        (["--rule", "loco-bpm", "--local-scale", "nan"], "--local-scale must be a number or auto, got 'nan'"),
        (["--rule", "loco-bpm", "--offset-scale", "x"], "--offset-scale must be a number or auto, got 'x'"),
        (
            ["--rule", "loco-bpm", "--local-scale", "auto", "--offset-batch", "48", "--offset-chunk", "7"],
            "--local-scale auto needs an --offset-batch of at least two whole chunks, got 48 in chunks of 7",
        ),
        (["--rule", "loco", "--weights", "/no/such.pth"], "--weights /no/such.pth cannot be read"),
        (["--rule", "gim", "--model", "vit-small", "--image-size", "32"], "--model vit-small needs images of 28 x 28"),
        (["--rule", "gim", "--adapter", "lora", "--model", "resnet-small"], "--adapter lora does not fit --model"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert command.main(["train", *arguments, "--limit", "256", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())  # no folder of a run that never was


def test_presets():
    """The paper's set-ups, and what is given beside them."""
    given = dict(rule="loco-bpm", compare=["bp"], data="cifar100", preset="bpm-vit-b-16-lora", epochs=2)
    s = settings_module.complete(given)
    assert (s.model, s.adapter, s.batch_size, s.image_size, s.augment) == ("vit-b-16", "lora", 64, 224, "none")
    options = s.options(rules.get("loco-bpm"))
    assert (s.epochs, s.optimizer) == (2, "sgd")
    assert (options.offset_batch, options.offset_chunk, options.period) == (320, 8, None)
    assert [optimizers.learning_rate(s, rule) for rule in s.rules] == [1e-3, 1e-3]
    ds = data.load("fashion-mnist", None, "none").truncated(8)
    ds.image_size = 224
    x, _ = ds.training_batch(torch.arange(2), None)
    assert x.shape == (2, 1, 224, 224) and next(iter(ds.test_batches(4)))[0].shape == (4, 1, 224, 224)


def test_a_preset_trains():
    """Two refreshed steps of the real network, on small images."""
    rule, given = (
        "loco-bpm",
        dict(
            preset="bpm-resnet50-lokr",
            data="fashion-mnist",
            batch_size=4,
            offset_batch=8,
            offset_chunk=4,
            image_size=32,
        ),
    )
    s = settings_module.complete({"rule": rule, "device": "cpu", **given})
    ds = data.load("fashion-mnist", None, "none").truncated(8)
    ds.image_size = 32
    run = loop.Run(s, rule, ds, None)
    for i in range(2):
        offset.refresh(run, torch.arange(8), 0)
        assert all(loss.isfinite() for loss in run.trainer.step(*run.batch_at(torch.arange(8), i)))
    offsets = [o for optimizer in run.trainer.optimizers for _, o in optimizer.offsets()]
    assert (
        len(offsets) == 161 and sum(o.any().item() for o in offsets) > 50
    )  # three factors of 53 layers, the classifier


@pytest.mark.parametrize("scale", ["local_scale", "offset_scale"])
def test_estimated_scales(scale):
    """--local-scale auto, --offset-scale auto: every unit's own, from equal chunks."""
    s = settings(offset_batch=30, units=3, **{scale: "auto"})
    run = loop.Run(s, "forward-forward-bpm", dataset(s), None)
    assert 30 % run.trainer.offset_chunk == 0 and run.trainer.offset_chunk <= 15
    offset.refresh(run, torch.arange(64), 0)
    estimates = [o.param_groups[0][scale] for o in run.trainer.optimizers]
    assert len(set(estimates)) == 3 and all(0 <= e < float("inf") for e in estimates)


def test_frozen_statistics():
    model = weights.network("resnet-small", 1, 10)
    weights.freeze_statistics(model)
    before = [b.clone() for b in model.buffers()]
    model.train()
    model(randn(4, 1, 28, 28)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers()))
    assert all(m.weight.grad is not None for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_units_of_a_network_are_the_network():
    x = randn(2, 1, 28, 28)
    for kind in ("resnet-small", "vit-small", "smallconv"):
        model = weights.network(kind, 1, 10).eval()
        y = x
        for part in partition.chain(model):
            y = part(y)
        assert torch.equal(y, model(x)) and all(list(part.parameters()) for part in partition.chain(model))
    assert isinstance(local_blocks("predsim", model, x, 10, units=3)[0], lnn.PredSimHead)
