"""Adapters in files: their keys, round trips, and files that are refused before the model changes. What the peers make
of them: test_peers.py."""

import json

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from tests.adapter.common import factors, images, net, shake
from tests.support.problems import randn
from tests.support.tolerances import assert_relative

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
LAYERS = ["conv", "block", "fc"]


def adapted(kind="lora", **options):
    return shake(lnn.adapt(net(), kind, LAYERS, verbose=False, **{"rank": 2, **options}))


def written(tmp_path, model, convention, **options):
    path = tmp_path / ("peft" if convention == "peft" else f"{convention}.safetensors")
    lnn.save_adapter(model, path, convention=convention, **options)
    return path


OPTIONS = [
    dict(alpha=3.0),
    dict(alpha=3.0, use_rslora=True),
    dict(kind="lokr", alpha=3.0),
    dict(kind="lokr", alpha=3.0, rank=1, decompose_both=True),
    dict(kind="lokr", alpha=3.0, rank=16),
    dict(kind="lokr", alpha=3.0, rank=16, scale_convention="peft"),
    dict(kind="lokr", alpha=3.0, factor=3, use_rslora=True),
]


@pytest.mark.parametrize("convention", ["peft", "lycoris", "kohya"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_round_trip(tmp_path, convention, options):
    model, x = adapted(**options), images()
    path = written(tmp_path, model, convention)
    torch.manual_seed(5)
    other = lnn.load_adapter(net(), path, "mine")
    assert_relative("y", other(x), model(x), 1e-6)
    same = [torch.equal(p, q) for p, q in zip(factors(other).values(), factors(model).values())]
    assert all(same) or options.get("scale_convention") and convention != "peft"  # there the scale is in a factor
    assert not any(p.requires_grad for p in other.parameters()) and other.conv.adapter_name == "mine"
    other = lnn.load_adapter(net(), path, is_trainable=True, convention=convention)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(factors(other))
    assert_relative("merged", lnn.merge(other.eval())(x), model(x), 1e-6)


def test_keys(tmp_path):
    """As the peers name them."""
    lora, lokr = adapted(), adapted("lokr", rank=2)
    keys = {c: set(safetensors.load_file(written(tmp_path, lora, c))) for c in ("lycoris", "kohya")}
    at = {"conv", "block_fc_1", "block_fc", "fc"}
    parts = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert keys["lycoris"] == {f"lycoris_{n}.{p}" for n in at for p in parts}
    assert keys["kohya"] == {f"lora_unet_{n}.{p}" for n in at for p in parts}
    path = written(tmp_path, lora, "kohya", prefix="lora_te1")
    assert {key.split("_fc")[0].split("_conv")[0] for key in safetensors.load_file(path)} == {
        "lora_te1",
        "lora_te1_block",
    }
    tensors = safetensors.load_file(written(tmp_path, lora, "peft") / "adapter_model.safetensors")
    names = ("conv", "block.fc_1", "block.fc", "fc")
    assert set(tensors) == {f"base_model.model.{n}.lora_{ab}.weight" for n in names for ab in "AB"}
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (2, 4, 3, 3)
    assert tensors["base_model.model.conv.lora_B.weight"].shape == (8, 2, 1, 1)
    tensors = safetensors.load_file(written(tmp_path, lokr, "peft") / "adapter_model.safetensors")
    assert {f"base_model.model.block.fc.lokr_{w}" for w in ("w1", "w2_a", "w2_b")} < set(tensors)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["decompose_factor"]) == ("LOKR", 2, -1)
    assert config["alpha_pattern"] == {r"block\.fc_1": 2, r"block\.fc": 4, "conv": 2, "fc": 4}
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_scale_is_in_the_file(tmp_path):
    """rank-stabilised: as alpha where the convention has no word for it."""
    model = adapted(alpha=3.0, rank=4, use_rslora=True)
    assert model.fc.scale == 1.5
    assert safetensors.load_file(written(tmp_path, model, "lycoris"))["lycoris_fc.alpha"] == 6.0
    config = json.loads((written(tmp_path, model, "peft") / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["lora_alpha"] == 3
    for convention, alpha in (("lycoris", 6.0), ("peft", 3.0)):
        layer = lnn.load_adapter(net(), written(tmp_path, model, convention)).fc
        assert (layer.scale, layer.alpha, layer.use_rslora) == (1.5, alpha, convention == "peft")


def test_a_chosen_adapter_of_several(tmp_path):
    model, x = adapted(), images()
    first = model(x)
    shake(lnn.adapt(model, "lokr", "fc", rank=2, adapter_name="second", verbose=False), 9)
    second = model(x)
    with pytest.raises(ValueError, match="adapter_name must be of default, second, got None"):
        lnn.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    lnn.save_adapter(model, tmp_path / "first", "default")
    lnn.save_adapter(model, tmp_path / "second.safetensors", "second", convention="lycoris")
    other = lnn.load_adapter(net(), tmp_path / "first", "first")
    assert_relative("first", other(x), first, 1e-6)
    lnn.load_adapter(other, tmp_path / "second.safetensors", "second")
    assert_relative("second alone", other(x), second, 1e-6)
    with pytest.raises(
        ValueError, match="adapter_name must be one that model has not yet, got 'first', which is a LoRA"
    ):
        lnn.load_adapter(other, tmp_path / "first", "first")


def test_modules_in_full(tmp_path):
    """train_head and train_norm go with the factors, in PEFT's folder alone."""
    model = shake(lnn.adapt(net(), "lora", "block", train_head="fc", train_norm=True, verbose=False))
    with pytest.raises(ValueError, match="convention must tell layers apart, got 'block.fc', which PEFT would take"):
        lnn.save_adapter(model, tmp_path / "peft")
    model = shake(lnn.adapt(net(), "lora", "block.fc_1", train_head="fc", train_norm=True, verbose=False))
    path, x = written(tmp_path, model, "peft"), images()
    assert json.loads((path / "adapter_config.json").read_text())["modules_to_save"] == ["norm", "fc"]
    other = lnn.load_adapter(net(), path, is_trainable=True)
    assert torch.equal(other(x), model(x))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = lnn.load_adapter(net(), path)
    assert not any(p.requires_grad for p in again.parameters())
    lnn.save_adapter(again, tmp_path / "again")
    assert torch.equal(lnn.load_adapter(net(), tmp_path / "again")(x), model(x))
    with pytest.raises(ValueError, match="convention must have a place for modules that learn in full, got 'kohya'"):
        written(tmp_path, model, "kohya")


@pytest.mark.parametrize("convention", ["peft", "lycoris"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path, convention, dtype):
    """A file's factors take that of the layers, float32 over halves."""
    path = written(tmp_path, adapted().to(dtype), convention)
    assert {
        t.dtype
        for t in safetensors.load_file(path if path.is_file() else path / "adapter_model.safetensors").values()
        if t.dim()
    } == {dtype}
    for base, factor in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        model = lnn.load_adapter(net(base), path)
        assert {p.dtype for p in factors(model).values()} == {factor}
        assert_relative("y", model(images(base)).double(), adapted().double()(images().double()), 0.1)
    model = lnn.load_adapter(net(torch.float16), path, autocast_adapter_dtype=False)
    assert {p.dtype for p in factors(model).values()} == {torch.float16}


def test_torchs_own_files(tmp_path):
    model, path = adapted(), tmp_path / "adapter.pt"
    torch.save(safetensors.load_file(written(tmp_path, model, "lycoris")), path)
    assert_relative("y", lnn.load_adapter(net(), path)(images()), model(images()), 1e-6)
    folder = written(tmp_path, model, "peft")
    torch.save(safetensors.load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(lnn.load_adapter(net(), folder)(images()), model(images()))


def test_prefixes(tmp_path):
    """Of a file for several models, and diffusers' without a config, whose alpha is the rank."""
    model = adapted(alpha=2.0)
    both = safetensors.load_file(written(tmp_path, model, "kohya"))
    both |= {key.replace("lora_unet_", "lora_te_"): 2 * t for key, t in both.items()}
    safetensors.save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(
        ValueError, match="prefix must be given where a file has several, got None and lora_te, lora_unet"
    ):
        lnn.load_adapter(net(), tmp_path / "both.safetensors")
    for prefix in ("lora_unet", "lora_unet_"):
        other = lnn.load_adapter(net(), tmp_path / "both.safetensors", prefix=prefix)
        assert_relative("y", other(images()), model(images()), 1e-6)
    with pytest.raises(ValueError, match="prefix must begin names in .*, got 'lora_x'; it has lora_te_block_fc"):
        lnn.load_adapter(net(), tmp_path / "both.safetensors", prefix="lora_x")
    plain = safetensors.load_file(written(tmp_path, model, "peft") / "adapter_model.safetensors")
    plain = {key.replace("base_model.model", "transformer"): t for key, t in plain.items()}
    safetensors.save_file({**plain, "text_encoder.q.lora_A.weight": torch.ones(2, 2)}, tmp_path / "d.safetensors")
    other = lnn.load_adapter(net(), tmp_path / "d.safetensors", prefix="transformer")
    assert other.fc.scale == 1.0 and torch.equal(other(images()), model(images()))


def test_names_that_one_convention_cannot_tell_apart(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.a_b = nn.ModuleDict({"b": nn.Linear(4, 4)}), nn.Linear(4, 4)

        def forward(self, x):
            return self.a_b(self.a["b"](x))

    model = shake(lnn.adapt(Both(), "lora", verbose=False))
    with pytest.raises(ValueError, match="convention must tell layers apart, .*'a.b' and 'a_b'; use convention='peft'"):
        written(tmp_path, model, "lycoris")
    assert not list(tmp_path.iterdir())
    one = shake(lnn.adapt(Both(), "lora", "a_b", verbose=False))
    with pytest.raises(ValueError, match="lycoris_a_b may mean a.b or a_b"):
        lnn.load_adapter(Both(), written(tmp_path, one, "lycoris"))


def state_of(model):
    return [
        (n, type(m), [(p.requires_grad, p.clone()) for p in m.parameters(recurse=False)])
        for n, m in model.named_modules()
    ]


def damaged(tensors, **changes):
    """Keys by their end; None takes them away."""
    tensors = dict(tensors)
    for end, value in changes.items():
        found = [key for key in tensors if key.endswith(end.replace("__", "."))]
        for key in found or [end.replace("__", ".")]:
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value(tensors[key]) if callable(value) else value
    return tensors


ONE = torch.ones(2, 2)
BAD = {  # {kind: [(changes, what the error says)]}
    "lycoris": [
        (dict(lycoris_fc__lora_up__weight=None), "lycoris_fc must have a with b, and has a"),
        (dict(lycoris_fc__lora_up__weight=lambda t: t[:-1]), r"b of 'fc' has shape \(4, 2\), expected \(5, 2\)"),
        (
            dict(lycoris_fc__lora_down__weight=lambda t: t[:, 1:]),
            r"a of 'fc' has shape \(2, 17\), expected \('rank', 18\)",
        ),
        (dict(lycoris_fc__lora_down__weight=lambda t: t[:1]), r"b of 'fc' has shape \(5, 2\), expected \(5, 1\)"),
        (dict(lycoris_fc__lora_down__weight=lambda t: t[:0]), "a factor of 'fc' is empty"),
        (dict(lycoris_conv__lora_down__weight=lambda t: t[..., 1:]), "a of 'conv' has shape"),
        (dict(lycoris_fc__lora_up__weight=lambda t: t.int()), "b of lycoris_fc is int32, not floating"),
        (dict(lycoris_fc__alpha=torch.tensor(float("nan"))), "lycoris_fc.alpha is no number"),
        (dict(lycoris_fc__alpha=torch.ones(3)), "lycoris_fc.alpha is no number"),
        (dict(lycoris_fc__dora_scale=ONE), "lycoris_fc.dora_scale: weights decomposed .* is not supported"),
        (dict(lycoris_conv__lora_mid__weight=ONE), "lycoris_conv.lora_mid.weight: the Tucker form is not supported"),
        (dict(lycoris_fc__hada_w1_a=ONE), "lycoris_fc.hada_w1_a is of no known adapter"),
        (dict(lycoris_fc__lokr_w1=ONE), "lycoris_fc has w1 beside the factors of lora"),
        (dict(lycoris_other__alpha=ONE), "lycoris_other is no layer of model"),
        (dict(lycoris_norm__lora_up__weight=ONE), "lycoris_norm is no layer of model"),
    ],
    "lokr": [
        (dict(lycoris_block_fc__lokr_w2_a=None), "lycoris_block_fc must have w2 or w2_a with w2_b, and has w1, w2_b"),
        (dict(lycoris_block_fc__lokr_w2=ONE), "lycoris_block_fc must have w2 or w2_a with w2_b, and has"),
        (dict(lycoris_block_fc__lokr_w1=None), "lycoris_block_fc must have w1 or w1_a with w1_b, and has w2_a, w2_b"),
        (
            dict(lycoris_block_fc__lokr_w1=lambda t: t[:-1]),
            r"w1 and w2 of 'block.fc' give a \(12, 12\) Kronecker product",
        ),
        (
            dict(lycoris_block_fc__lokr_w2_b=lambda t: t[:1]),
            r"w2_b of 'block.fc' has shape \(1, 4\), expected \(2, 'in'\)",
        ),
        (dict(lycoris_conv__lokr_w2=lambda t: t[..., 0]), r"w2 of 'conv' has shape .*, expected \('out', 'in', 3, 3\)"),
        (dict(lycoris_conv__lokr_t2=ONE), "lycoris_conv.lokr_t2: the Tucker form is not supported"),
    ],
    "peft": [
        (dict(model__fc__lora_B__weight=None), "fc must have a with b, and has a"),
        (
            dict(base_model__model__x__lora_A__weight=ONE, base_model__model__x__lora_B__weight=ONE),
            "'x' is no layer of model",
        ),
        (dict(base_model__model__fc__bias=ONE), "base_model.model.fc.bias is of no known adapter"),
        (dict(base_model__model__fc__lora_magnitude_vector=ONE), "lora_magnitude_vector is of no known adapter"),
        (
            dict(base_model__model__norm__lora_A__weight=ONE, base_model__model__norm__lora_B__weight=ONE),
            "'norm' is a LayerN",
        ),
        (dict(other__lora_A__weight=ONE), "other.lora_A.weight: not base_model.model...."),
        (dict(model__fc__lora_A__weight=lambda t: t[:1]), "has r=2 for 'fc', whose factors are of rank 1"),
    ],
}


@pytest.mark.parametrize("kind, changes, message", [(k, c, m) for k, cases in BAD.items() for c, m in cases])
def test_bad_tensors(tmp_path, kind, changes, message):
    model = adapted("lokr" if kind == "lokr" else "lora")
    path = written(tmp_path, model, "peft" if kind == "peft" else "lycoris")
    file = path / "adapter_model.safetensors" if kind == "peft" else path
    tensors = {key: t.clone().contiguous() for key, t in damaged(safetensors.load_file(file), **changes).items()}
    safetensors.save_file(tensors, file)
    refused(path, message)


def refused(path, message, **options):
    fresh = net()
    before = str(state_of(fresh))
    with pytest.raises(ValueError, match=message) as caught:
        lnn.load_adapter(fresh, path, **options)
    assert str(caught.value).startswith(("path must ", "prefix must ")) and str(state_of(fresh)) == before
    assert len(str(caught.value)) < 600


CONFIGS = [
    (dict(peft_type="LOHA"), "has peft_type='LOHA', expected LORA or LOKR"),
    (dict(use_dora=True), "has use_dora=True, which is not supported"),
    (dict(bias="all"), "has bias='all', which is not supported"),
    (dict(a_later_option={"x": 1}), "has a_later_option={'x': 1}, which is not supported"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4' changed the weights of its model"),
    (dict(r=3), "has r=3 for 'block.fc', whose factors are of rank 2"),
    (dict(r=0), "has r=0 for 'block.fc'"),
    (dict(r="2"), "has r='2', expected a number"),
    (dict(lora_alpha=None), "has alpha=None, expected a number"),
    (dict(lora_alpha=float("inf")), "has alpha=inf, expected a number"),
    (dict(alpha_pattern=[1]), r"has alpha_pattern=\[1\], expected an object"),
]


@pytest.mark.parametrize("changes, message", CONFIGS)
def test_bad_config(tmp_path, changes, message):
    path = written(tmp_path, adapted(), "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    refused(path, message)


def test_bad_files(tmp_path):
    path = written(tmp_path, adapted(), "lycoris")
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read")
    path.write_bytes(whole[:20] + bytes(b ^ 255 for b in whole[20:60]) + whole[60:])
    refused(path, "cannot be read")
    refused(tmp_path / "none.safetensors", "path must be a file or PEFT's folder, got .*, which does not exist")
    refused(tmp_path, "it has neither adapter_model.safetensors nor adapter_model.bin")
    safetensors.save_file({}, path)
    refused(path, "it is empty")
    folder = written(tmp_path, adapted(), "peft")
    refused(folder, "it is a folder, and convention='kohya' has one file", convention="kohya")
    for text in ("", "[1]", "{", '{"r": 1'):
        (folder / "adapter_config.json").write_text(text)
        refused(folder, "cannot be read" if text != "[1]" else "it is no object")
        refused(folder / "adapter_model.safetensors", "cannot be read" if text != "[1]" else "it is no object")
    (folder / "adapter_config.json").unlink()
    refused(folder, "cannot be read")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize("content", [Harmful(), {"lycoris_fc.alpha": Harmful()}, [ONE], {"x": 1}, ONE])
def test_nothing_of_a_file_is_executed(tmp_path, content):
    torch.save(content, tmp_path / "adapter.pt")
    refused(tmp_path / "adapter.pt", "cannot be read|no dict of tensors")


def test_an_adapter_for_another_kind_of_layer(tmp_path):
    safetensors.save_file(
        {f"lycoris_emb.lora_{k}.weight": ONE.clone() for k in ("up", "down")}, tmp_path / "x.safetensors"
    )
    model = nn.ModuleDict({"emb": nn.Embedding(2, 2), "fc": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="lycoris_emb is no layer of model"):
        lnn.load_adapter(model, tmp_path / "x.safetensors")


def test_what_is_refused_when_saving(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="path must be a .safetensors file with convention='lycoris', got"):
        lnn.save_adapter(model, tmp_path / "x.pt", convention="lycoris")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a folder with convention='peft', got .*, which is a file"):
        lnn.save_adapter(model, tmp_path / "file")
    with pytest.raises(ValueError, match="adapter_name must be of an adapter of model, which has none, got None"):
        lnn.save_adapter(net(), tmp_path / "x")
    grouped = lnn.adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "lora", "0", verbose=False)
    with pytest.raises(
        ValueError, match="convention must know what the adapter is, got '0', a convolution with groups"
    ):
        lnn.save_adapter(grouped, tmp_path / "x")
    shake(grouped)
    lnn.save_adapter(grouped, tmp_path / "x.safetensors", convention="lycoris")
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    base.load_state_dict({k: getattr(grouped[0].base, k[2:]) for k in base.state_dict()})
    x = randn(1, 4, 5, 5)
    assert_relative("grouped", lnn.load_adapter(base, tmp_path / "x.safetensors")(x), grouped(x), 1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.safetensors"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path, adapted(), "lycoris")
    before = path.read_bytes()

    def fails(tensors, at, metadata):
        with open(at, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        lnn.save_adapter(adapted(alpha=1.0), path, convention="lycoris")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
