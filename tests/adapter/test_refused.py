"""Adapters and files that mean something else to PEFT, and bad arguments: errors before anything changes."""

import warnings

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.core import optional
from tests.adapter.common import factors, shake
from tests.support.problems import randn

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

OTHERS = {
    "a convolution with padding_mode='circular': PEFT's LoRA of it pads": dict(padding=1, padding_mode="circular"),
    "a convolution with padding_mode='reflect': PEFT's LoRA of it pads": dict(padding="same", padding_mode="reflect"),
    r"a convolution with dilation=\(2, 1\): PEFT's LoRA of it is not dilated": dict(dilation=(2, 1)),
    "a convolution with groups: PEFT's LoRA of it is no change of its weight": dict(groups=2),
}


@pytest.mark.parametrize("message", OTHERS)
def test_convolutions_of_which_peft_computes_something_else(tmp_path, message):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3, **OTHERS[message]))

    model, x = shake(lnn.adapt(plain(), "lora", "0", verbose=False)), randn(1, 4, 7, 7)
    with pytest.raises(ValueError, match=f"convention must know what the adapter is, got '0', {message}.*'lycoris'"):
        lnn.save_adapter(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    file = tmp_path / "x.safetensors"
    lnn.save_adapter(model, file, convention="lycoris")
    assert torch.allclose(lnn.load_adapter(plain(), file)(x), model(x), atol=1e-6)
    prefix = "base_model.model.0"
    safetensors.save_file(
        {f"{prefix}.lora_A.weight": model[0].a.detach(), f"{prefix}.lora_B.weight": model[0].b.detach()}, file
    )
    other = plain()
    with pytest.raises(ValueError, match=f"path must hold an adapter that fits model, got .*: '0' is {message}"):
        lnn.load_adapter(other, file)
    assert not factors(other) and all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding_mode="circular"),
        dict(kernel_size=1, dilation=2),
        dict(kernel_size=3, padding="valid", padding_mode="reflect"),
    ],
)
def test_a_padding_or_dilation_that_does_nothing(tmp_path, options):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, **options))

    model, x = shake(lnn.adapt(plain(), "lora", "0", verbose=False)), randn(1, 4, 7, 7)
    lnn.save_adapter(model, tmp_path)
    assert torch.allclose(lnn.load_adapter(plain(), tmp_path)(x), model(x), atol=1e-6)


def test_lokr_of_conv1d(tmp_path):
    class Conv1D(nn.Module):
        __module__ = "transformers.pytorch_utils"

        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(randn(4, 6)), nn.Parameter(randn(6))

    model = lnn.adapt(nn.Sequential(Conv1D()), "lokr", verbose=False)
    with pytest.raises(ValueError, match="convention must know .* got '0', a Conv1D of transformers: PEFT has no LoKr"):
        lnn.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    lnn.save_adapter(model, tmp_path / "x.safetensors", convention="lycoris")


def adapted():
    return lnn.adapt(nn.Sequential(nn.Linear(4, 4)), "lora", verbose=False)


@pytest.mark.parametrize("name", ["type", "keys", "pop", "training"])
def test_adapter_names_that_a_module_dict_cannot_hold(tmp_path, name):
    lnn.save_adapter(adapted(), tmp_path)
    for change in (lnn.load_adapter, lambda model, _, name: lnn.adapt(model, "lora", adapter_name=name)):
        model = adapted()
        before = [(n, p.requires_grad) for n, p in model.named_parameters()]
        with pytest.raises(ValueError, match=f"adapter_name must be no attribute of .*ModuleDict, .* got '{name}'"):
            change(model, tmp_path, name)
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_the_base_in_peft_files(tmp_path, dtype):
    """They are the model's, up to the dtype, or an error."""
    model = adapted()
    lnn.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    key = "base_model.model.0.base_layer"
    base = {f"{key}.{n}": p.detach().to(dtype) for n, p in model[0].base.named_parameters()}

    def fresh():
        other = nn.Sequential(nn.Linear(4, 4))
        other.load_state_dict({n: getattr(model[0].base, n[2:]) for n in other.state_dict()})
        return other

    safetensors.save_file(tensors | base, file)
    other = lnn.load_adapter(fresh(), file)
    assert torch.equal(other[0].base.weight, model[0].base.weight) and factors(other).keys() == factors(model).keys()
    for change, message in [
        ({f"{key}.weight": base[f"{key}.weight"] + 1}, "0.base_layer.weight is not 0.weight of model: load"),
        ({f"{key}.weight": base[f"{key}.weight"][:1].clone()}, "0.base_layer.weight is not 0.weight of model: load"),
        ({"base_model.model.x.base_layer.weight": randn(2)}, "x.base_layer.weight is of no parameter of model"),
    ]:
        safetensors.save_file(tensors | base | change, file)
        other = fresh()
        with pytest.raises(ValueError, match=f"path must hold an adapter that fits model, got .*: {message}"):
            lnn.load_adapter(other, file)
        assert not factors(other)


def test_a_folder_of_peft_with_the_base_of_its_head(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        optional.torchvision()  # which transformers imports where it is there
    except ImportError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="peft is not installed")

    def gpt2():
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()

    tokens = torch.arange(12).view(1, 12)
    own = shake(lnn.adapt(gpt2(), "lora", rank=2, verbose=False))
    lnn.save_adapter(own, tmp_path / "ours")
    peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    held = safetensors.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in held
    again = lnn.load_adapter(gpt2(), tmp_path / "theirs")
    assert torch.equal(again(tokens).logits, own(tokens).logits)


@pytest.mark.parametrize("convention", ["peft", "lycoris"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite(tmp_path, convention, value):
    model = adapted()
    with torch.no_grad():
        model[0].b[1] = value
    path = tmp_path / "x.safetensors"
    lnn.save_adapter(model, tmp_path / "x" if convention == "peft" else path, convention=convention)
    key = "base_model.model.0.lora_B.weight" if convention == "peft" else "lycoris_0.lora_up.weight"
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"path must .*: {key} has values that are not finite"):
        lnn.load_adapter(other, tmp_path / "x" if convention == "peft" else path)
    assert not factors(other)


@pytest.mark.parametrize("convention", ["kohya", "lycoris"])
def test_a_file_in_no_folder(tmp_path, convention, monkeypatch):
    with pytest.raises(ValueError, match="path must be a file in a folder that exists, got .*none.x.safetensors'"):
        lnn.save_adapter(adapted(), tmp_path / "none" / "x.safetensors", convention=convention)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    lnn.save_adapter(adapted(), "x.safetensors", convention=convention)


def test_options_of_another_kind():
    model = nn.Sequential(nn.Linear(4, 4))
    known = "which takes use_rslora, dropout, autocast_adapter_dtype, got 3"
    with pytest.raises(TypeError, match=f"factor must be left out with kind='lora', {known}"):
        lnn.adapt(model, "lora", factor=3)
    with pytest.raises(TypeError, match="dropout must be left out with kind='lokr', which takes factor, decompose"):
        lnn.adapt(model, "lokr", dropout=0.1)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_is_a_layer():
    with pytest.raises(ValueError, match="model must hold the layers that are adapted, got Linear, which is itself"):
        lnn.adapt(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="got none in Sequential with target=None"):
        lnn.adapt(nn.Sequential(nn.ReLU()))
