"""Cutting models into units, and the saved-byte table of the specification (resolution 224, batch 64, float32)."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lgkernels
from lgkernels.__main__ import main
from lgkernels.core import optional
from lgkernels.recipes import networks, plan, weights
from lgkernels.recipes.measure import peak_memory
from lgkernels.training import partition, planner, split_blocks
from lgkernels.training.attention import counted_attention
from tests.support.problems import randn


@pytest.fixture(scope="module")
def models():
    try:
        return optional.torchvision().models
    except ImportError as error:
        pytest.skip(f"torchvision is not there ({error})")


@pytest.fixture(scope="module")
def image():
    return torch.empty(64, 3, 224, 224, device="meta")


def resnet(models):
    with torch.device("meta"):
        return models.resnet50(num_classes=100)


def vit(models):
    with torch.device("meta"):
        return models.vit_b_16(num_classes=100)


def megabytes(model, units, image):
    """(all of back-propagation, [units])."""
    return (
        partition.saved_bytes(partition.chain(model), image)[0] / 1e6,
        [b / 1e6 for b in partition.unit_bytes(units, image)],
    )


def close(got, expected):
    assert abs(got - expected) <= 0.02 * expected, f"{got:.0f} MB, expected {expected}"


@pytest.mark.parametrize(
    "cuts, expected",
    [
        ([4, 8, 14], [2659, 1696, 1156, 347]),  # stages, the stem in the first
        ([1, 4, 8, 14], [552, 2107, 1696, 1156, 347]),  # the stem apart
        ([2, 4, 8], [1426, 1439, 1696, 1452]),  # before res2.1, res3.0, res4.0
    ],
)
def test_resnet_stages(models, image, cuts, expected):
    model = resnet(models)
    total, units = megabytes(model, split_blocks(model, cuts), image)
    close(total, 5498)
    for got, want in zip(units, expected, strict=True):
        close(got, want)


@pytest.mark.parametrize("count, largest", [(4, 1696), (6, 1387), (8, 964), (17, 873)])
def test_resnet_balanced(models, image, count, largest):
    model = resnet(models)
    close(max(megabytes(model, split_blocks(model, count, input=image), image)[1]), largest)


@pytest.mark.parametrize(
    "attention, total, count, largest",
    [("eager", 8870, 4, 2217), ("eager", 8870, 12, 739), ("flash", 7446, 4, 1862), ("flash", 7446, 12, 620)],
)
def test_vit(models, image, attention, total, count, largest):
    """Encoder layers in equal groups, the embedding with the first, the head with the last."""
    model = vit(models)
    with counted_attention(attention):
        got, units = megabytes(model, split_blocks(model, [1 + i * 12 // count for i in range(1, count)]), image)
    close(got, total)
    # the table's unit is a group of layers; the ends also keep the image (39 MB), and the last norm's input and output
    close(units[1], largest)
    assert max(units) == units[-1] <= largest + 80


def test_the_plan_of_a_resnet(models, image):
    rows = {r.name: r for r in lgkernels.plan(resnet(models), image, "4GB").rows}
    close(rows["BP"].peak / 1e6, 5783)
    close(rows["BP, 8 at a time"].activations / 1e6, 688)
    close(rows["local, 18 units"].activations / 1e6, 873)
    close(rows["BP-modified, 18 units"].peak / 1e6, 1182)
    assert not rows["BP"].fits and rows["BP-modified, 4 units"].fits
    assert rows["BP-modified, 4 units"].compute == pytest.approx(1.013, abs=1e-3)
    close(rows["two views, 18 units"].activations / 1e6, 2 * 873)
    assert rows["BP-modified forward-forward, 4 units"].compute == pytest.approx(
        7 / 3 + 320 / 50_000 * 10 / 3, abs=1e-3
    )


def test_the_plan_counts_what_a_rule_costs():
    """Of the rules' rows and work (`UNIT_COSTS`): Forward-Forward runs two samples forward and back for each, and one
    forward pass without labels; LoCo and GIM two views."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    rows = {r.name: r for r in lgkernels.plan(model, (32, 64), units=(2,)).rows}
    local = rows["local, 2 units"]
    for rule, samples, work in (("two views", 2, 2.0), ("forward-forward", 2, 7 / 3)):
        row = rows[f"{rule}, 2 units"]
        assert (row.activations, row.compute) == (samples * local.activations, work)
    assert local.compute == 1.0


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_plan_is_what_a_step_takes(name):
    """Within 5 % of the measured peak of a real step of back-propagation on a CPU."""
    torch.manual_seed(0)
    parts, shape = (
        (networks.resnet18(3, 10), (16, 3, 96, 96))
        if name == "resnet"
        else (networks.vit(3, 10, image=64, patch=8, dim=128, depth=4, heads=4), (64, 3, 64, 64))
    )
    model = nn.Sequential(*parts)
    x, y = randn(*shape), torch.arange(shape[0]) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # momentum
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = 2 * weights + sum(b.numel() * b.element_size() for b in model.buffers()) + x.numel() * x.element_size()
    measured = there + peak_memory(step, torch.device("cpu"))
    predicted = lgkernels.plan(model, x).rows[0].peak
    assert abs(predicted - measured) <= 0.05 * measured, f"{predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f}"


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf"])
def test_the_plan_of_a_converted_model(rule):
    """The meta device, which has no autocast, runs the feedback layers."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6), nn.ReLU(), nn.Linear(6, 4))
    plain = lgkernels.plan(model, (16, 3, 8, 8))
    converted = lgkernels.plan(lgkernels.convert(model, rule), (16, 3, 8, 8))
    assert [r.name for r in plain.rows] == [r.name for r in converted.rows]
    assert 0.9 < converted.rows[0].activations / plain.rows[0].activations < 1.2


def test_micro_batches_that_batch_normalisation_refuses():
    """One value per channel has no variance: no row for it, and no refresh with it."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
    )
    rows = lgkernels.plan(model, (64, 3, 8, 8), units=(6,)).rows
    assert [r.name for r in rows][:3] == ["BP", "BP, 32 at a time", "BP, 8 at a time"]
    last = lgkernels.plan(model, (2, 3, 8, 8), units=(6,)).rows[-1]
    assert last.exactness == "local losses, offset by BP (2 at a time)"


def test_the_plan_of_a_frozen_model():
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        lgkernels.plan(sequential().requires_grad_(False), (4, 8))


def test_our_resnet50_is_the_tables(image):
    """The recipe's network keeps what torchvision's does; needs no torchvision."""
    with torch.device("meta"):
        model = weights.network("resnet50", 3, 100)
    total, units = megabytes(model, split_blocks(model, list(range(2, 17))), image)
    close(total, 5498)
    assert len(units) == 16
    close(max(megabytes(model, split_blocks(model, 17, input=image), image)[1]), 873)
    close(max(megabytes(model, split_blocks(model, 4, input=image), image)[1]), 1696)


def test_without_torchvision(monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(optional, "torchvision", missing)
    assert main(["plan", "--model", "resnet18"]) == 1
    assert (
        "plan --model resnet18 needs torchvision, which is not here (No module named 'torchvision'); without it there "
        "are resnet50, vit_b_16" in capsys.readouterr().out
    )
    assert main(["plan", "--model", "vit_b_16", "--image", "32"]) == 2
    assert "takes --image 224 alone, got 32" in capsys.readouterr().out
    seen = []
    monkeypatch.setattr(plan, "plan", lambda model, *_, **__: seen.append(model))
    assert main(["plan", "--model", "resnet50", "--classes", "7"]) == 0  # our own
    assert [tuple(p.shape) for p in seen[0].parameters()][-1] == (7,) and next(seen[0].parameters()).is_meta


def test_the_plan_command(models, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    chart = tmp_path / "plan.svg"
    assert (
        main(
            ["plan", "--model", "resnet18", "--batch", "8", "--image", "64", "--memory", "100MB", "--plot", str(chart)]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "BP, checkpointed" in text and "memory: 100 MB" in text and chart.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "alexnet"], "--model must be a ResNet or vision transformer of torchvision, got 'alexnet'"),
        (["--model", "resnet"], "--model must be a ResNet or vision transformer of torchvision, got 'resnet'"),
        (["--memory", "8G"], "--memory must be a number of bytes, or a text such as '8GB' or '24GiB', got '8G'"),
        (["--memory", "nan"], "--memory must be a number of bytes, or a text such as '8GB' or '24GiB', got 'nan'"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--image", "-1"], "--image must be at least 1, got -1"),
        (["--classes", "0"], "--classes must be at least 1, got 0"),
        (["--optimizer-state", "-3"], "--optimizer-state must be at least 0, got -3"),
        (
            ["--model", "vit_b_16", "--image", "225"],
            "--model vit_b_16 cannot take --image 225 with --batch 8: Input shape indivisible by patch size!",
        ),
        (
            ["--batch", "1", "--image", "32"],
            "--model resnet18 cannot take --image 32 with --batch 1: Expected more than 1 "
            "value per channel when training, got input size torch.Size([1, 512, 1, 1])",
        ),
        (["--plot", "/nonexistent/x.png"], "--plot /nonexistent/x.png cannot be written: "),
        (["--plot", "x.unknown"], "--plot x.unknown cannot be written: "),
    ],
)
def test_wrong_options_of_the_plan_command(models, capsys, arguments, message):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["plan", "--model", "resnet18", "--batch", "8", "--image", "64", *arguments]) == 2
    assert message in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "memory, expected", [("8GB", 8e9), ("1.5GiB", 1.5 * 2**30), ("2e3", 2e3), ("10B", 10.0), (7, 7.0)]
)
def test_memory_units(memory, expected):
    assert planner.parse_memory(memory) == expected


def test_bad_memory():
    with pytest.raises(ValueError, match="memory must be a number of bytes, or a text such as '8GB'"):
        planner.parse_memory("8 gigs")


@pytest.mark.parametrize("name, size", [("resnet18", 32), ("resnet50", 32), ("vit_b_16", 224)])
def test_units_are_the_model(models, name, size):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=5).eval()
    x = randn(2, 3, size, size)
    units = split_blocks(model, 3, input=x)
    assert torch.equal(in_turn(units, x), model(x))
    own = {id(p) for p in model.parameters()}
    parts = [id(p) for unit in units for p in unit.parameters()]
    assert sorted(own) == sorted(parts)


def in_turn(units, x):
    for unit in units:
        x = unit(x)
    return x


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit", dict(pos_drop_rate=0.2)),
        ("vit", dict(drop_rate=0.2)),
        ("vit", dict(patch_drop_rate=0.5)),
        ("vit", dict(global_pool="avg")),
        ("vit", dict(global_pool="map")),
        ("vit", dict(pre_norm=True)),
        ("deit", dict(drop_rate=0.2)),
        ("resnet", dict(drop_rate=0.5)),
    ],
)
def test_units_are_timms_model(models, name, options):
    """In both modes, whether the model or the units are switched; every parameter belongs to one unit."""
    timm = pytest.importorskip("timm", reason="timm is not installed").models
    torch.manual_seed(0)
    small = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    model = (
        timm.resnet18(num_classes=5, **options)
        if name == "resnet"
        else timm.vision_transformer.VisionTransformer(**small, num_classes=5, **options)
        if name == "vit"
        else timm.deit.VisionTransformerDistilled(**small, num_classes=5, **options)
    )
    x = randn(4, 3, 16, 16) if name != "resnet" else randn(4, 3, 32, 32)
    units = nn.ModuleList(split_blocks(model, 3, input=x))
    assert sorted(map(id, model.parameters())) == sorted(id(p) for unit in units for p in unit.parameters())
    for switched in (model, units):
        for mode in (False, True):
            model.train(not mode)
            switched.train(mode)
            outs = []
            for run in (lambda: in_turn(units, x), lambda: model.train(mode)(x)):
                torch.manual_seed(1)
                outs.append(run())
            assert torch.equal(*outs)


def sequential():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))


def test_sequential():
    model, x = sequential(), randn(3, 8)
    units = split_blocks(model, 2, balance="parts")
    assert [len(u) for u in units] == [2, 3]
    assert torch.equal(units[1](units[0](x)), model(x))
    assert units[0][0] is model[0]


def test_a_subclass_of_sequential():
    class Named(nn.Sequential):
        pass

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    assert [len(u) for u in split_blocks(Named(*sequential()), 2, balance="parts")] == [2, 3]
    with pytest.raises(TypeError, match="got Residual: write it as an nn.Sequential"):
        split_blocks(Residual(nn.Linear(4, 4), nn.Linear(4, 4)), 2, balance="parts")


class LookAlike(nn.Module):
    """A small ResNet by its attributes; `kind` says what its forward does beside theirs."""

    def __init__(self, kind="", device=None):
        super().__init__()
        self.kind = kind
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))
        self.fc = nn.Linear(4, 3)
        nn.init.zeros_(self.fc.weight)  # as timm's heads: hides all that comes before it
        self.to(device)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x if self.kind == "no pool" else self.maxpool(x))
        x = self.layer3(self.layer2(x * torch.sigmoid(x) if self.kind == "gate" else x))
        x = torch.flatten(self.avgpool(self.layer4(x)), 1)
        x = nn.functional.normalize(x) if self.kind == "normalise" else x
        return self.fc(nn.functional.dropout(x, 0.5, self.training and self.kind == "dropout"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["no pool", "gate", "normalise", "dropout"])
def test_what_only_looks_like_a_resnet(kind, device):
    x = torch.empty(4, 3, 16, 16)
    for call in (
        lambda m: split_blocks(m, 2, input=x),
        lambda m: split_blocks(m, 2, balance="parts"),
        lambda m: lgkernels.plan(m, x),
    ):
        with pytest.raises(
            TypeError, match=r"model \(LookAlike\) looks like .*\(\w+ mode\): .* or write it as an nn.Seq"
        ):
            call(LookAlike(kind, device))


def test_a_second_head_in_training_is_not_lost():
    class Auxiliary(LookAlike):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(4, 3)

        def forward(self, x):
            out = super().forward(x)
            return (out, self.auxiliary(out.new_zeros(len(out), 4))) if self.training else out

    with pytest.raises(TypeError, match="its parts do not hold auxiliary.weight, auxiliary.bias: name its list"):
        split_blocks(Auxiliary(), 2, input=torch.empty(4, 3, 16, 16))


def test_a_resnet_by_its_attributes():
    torch.manual_seed(0)
    model, x = LookAlike(), torch.randn(4, 3, 16, 16)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    units = split_blocks(model, 2, input=x)
    assert model.training and units[0].training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(in_turn(units, x), model(x))
    assert lgkernels.plan(model, x).rows
    with pytest.raises(TypeError, match=r"could not be tried on an input of shape \(2, 5, 16, 16\) .*give an input"):
        split_blocks(model, 2, input=torch.empty(4, 5, 16, 16))


def test_a_sequential_with_a_forward_of_its_own():
    """Set on the instance, or by hooks: no part has it. Inside it stays whole."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert len(partition.chain(nn.Sequential(inner))) == 2
    handle = inner.register_forward_hook(lambda module, args, out: -out)
    assert partition.chain(nn.Sequential(inner)) == [inner]
    with pytest.raises(TypeError, match="got Sequential with hooks or a forward of its own, which its parts do"):
        partition.chain(inner)
    handle.remove()
    inner.forward = lambda x: x
    assert partition.chain(nn.Sequential(inner)) == [inner]


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune", "parametrization"])
def test_weights_that_are_made_of_others(kind):
    """torch copies no tensor with a history, which is what these make of a weight in a forward."""
    wrap = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "parametrization": nn.utils.parametrizations.weight_norm,
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have them parametrised
        model, x = nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
        model(x).sum().backward()
    assert lgkernels.plan(model, (3, 4)).rows
    assert [len(u) for u in split_blocks(model, 2, input=x)] == [1, 2]


def test_overlap():
    units = split_blocks(sequential(), [1, 3], overlap_blocks=1)
    assert [len(u) for u in units] == [2, 3, 2]
    assert units[0][1] is units[1][0] and units[1][2] is units[2][0]
    assert [len(u) for u in split_blocks(sequential(), [1, 2, 4], overlap_blocks=2)] == [2, 3, 3, 1]  # all of the next


def test_saved_bytes_of_a_real_backward():
    """The meta count is what the hooks see on real tensors, each storage once."""
    model, x = sequential(), randn(3, 8)
    meta = partition.saved_bytes([partition.to_meta(model)], x.to("meta"))[0]
    assert meta == partition.saved_bytes([model], x)[0] == 4 * 3 * (8 + 8 + 16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(units=9, balance="parts"), ValueError, "units must be at most 5, the parts of the model, got 9"),
        (dict(units=0), ValueError, "units must be at least 1, got 0"),
        (dict(units=[3, 2]), ValueError, "units must be increasing part numbers in [1, 4], got [3, 2]"),
        (dict(units=[1.5, 3]), TypeError, "units[0] must be an int, got float"),
        (dict(overlap_blocks=-1), ValueError, "overlap_blocks must be at least 0, got -1"),
        (dict(overlap_blocks=1.5), TypeError, "overlap_blocks must be an int, got float"),
        (dict(units=2), ValueError, 'input must be an example batch for balance="memory", got None'),
        (dict(balance="time"), ValueError, "balance must be one of 'memory', 'parts', got 'time'"),
        (
            dict(model=nn.Linear(2, 2)),
            TypeError,
            "model must be an nn.Sequential, a ResNet or vision transformer of torchvision or timm, or have a list of "
            "layers (path), got Linear: write it as an nn.Sequential of its parts",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        split_blocks(**{"model": sequential(), **arguments})
    assert str(caught.value) == message
