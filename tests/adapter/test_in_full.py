"""What an adapter trains in full, beside its factors: it is remembered, restored by set_adapter, and saved."""

import json

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from tests.adapter.common import images, net, shake

pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def styled():
    """A head and a norm that one adapter has trained; then another one is put on the model."""
    model = lnn.adapt(net(), "lora", "conv", train_head="fc", train_norm=True, adapter_name="style", verbose=False)
    shake(model)
    y = model(images()).detach()
    lnn.adapt(model, "lora", "conv", adapter_name="subject", verbose=False)
    return model, y


IN_FULL = {"fc.weight", "fc.bias", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("frozen", [False, True])
def test_is_saved_though_it_is_frozen_by_now(tmp_path, frozen):
    model, y = styled()
    if frozen:
        model.requires_grad_(False)
    lnn.save_adapter(model, tmp_path / "style", "style")
    assert json.loads((tmp_path / "style" / "adapter_config.json").read_text())["modules_to_save"] == ["norm", "fc"]
    assert torch.equal(lnn.load_adapter(net(), tmp_path / "style")(images()), y)
    with pytest.raises(ValueError, match="convention must have a place for modules that learn in full, .* fc, norm"):
        lnn.save_adapter(model, tmp_path / "x.safetensors", "style", convention="lycoris")


def test_is_of_the_adapter_that_trains_it(tmp_path):
    model, _ = styled()
    for _ in range(2):
        lnn.save_adapter(model, tmp_path / "subject", "subject")
        config = json.loads((tmp_path / "subject" / "adapter_config.json").read_text())
        assert config["modules_to_save"] is None
        lnn.set_adapter(model, "style")


def test_set_adapter_lets_it_learn_again():
    model, _ = styled()
    style, subject = {"conv.a", "conv.b"}, {"conv.adapters.subject.a", "conv.adapters.subject.b"}
    assert learning(model) == subject
    for chosen, expected in [
        ("style", style | IN_FULL),
        ("subject", subject),
        (["style", "subject"], style | subject | IN_FULL),
        ((), set()),
    ]:
        assert learning(lnn.set_adapter(model, chosen)) == expected


@pytest.mark.parametrize("is_trainable", [False, True])
def test_of_a_loaded_adapter(tmp_path, is_trainable):
    lnn.save_adapter(styled()[0], tmp_path, "style")
    model = lnn.load_adapter(net(), tmp_path, "style", is_trainable=is_trainable)
    lnn.adapt(model, "lora", "conv", adapter_name="subject", verbose=False)
    assert not learning(model) & IN_FULL
    lnn.set_adapter(model, "style")
    assert learning(model) & IN_FULL == (IN_FULL if is_trainable else set())


def test_a_head_that_another_adapter_stands_around(tmp_path):
    """Its base learns, and is saved; the other adapter's factors do not."""
    model = lnn.adapt(net(), "lora", "fc", adapter_name="subject", verbose=False)
    shake(model)
    lnn.adapt(model, "lora", "conv", train_head="fc", adapter_name="style", verbose=False)
    conv, head = {"conv.a", "conv.b"}, {"fc.base.weight", "fc.base.bias"}
    assert learning(model) == conv | head
    shake(model, 9)
    y = model(images())
    lnn.save_adapter(model, tmp_path / "style", "style")
    assert torch.equal(lnn.load_adapter(net(), tmp_path / "style")(images()), y)
    assert learning(lnn.set_adapter(model, "subject")) == {"fc.a", "fc.b"}
    lnn.merge(model)
    with pytest.raises(ValueError, match="model must not be merged, got 'fc' merged: unmerge"):
        lnn.save_adapter(model, tmp_path / "x", "style")
    assert not (tmp_path / "x").exists()


def test_what_the_user_lets_learn_is_saved_too(tmp_path):
    model = lnn.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "lora", "0", verbose=False)
    model[1].requires_grad_(True)
    lnn.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["1"]
