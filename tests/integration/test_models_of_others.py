"""Tiny models of `transformers` and `timm` under feedback rules and with adapters, whose files PEFT loads."""

import json

import pytest
import torch

import lgkernels.nn as lnn
from lgkernels import convert
from tests.support.tiny_models import batch, logits, loss_of, tiny
from tests.support.tolerances import assert_relative

NAMES = ["gpt2", "llama", "vit", "timm_vit"]


@pytest.mark.parametrize("name", NAMES)
def test_sign_symmetry(name):
    """GPT-2's own Conv1D is no nn.Linear and stays, as the summary says; all others' layers learn under the rule."""
    model, (x, target) = tiny(name), batch(name)
    before = logits(model.eval()(x))
    convert(model, "usf", verbose=False, last_layer="bp" if name != "gpt2" else "convert")
    kinds = [m for m in model.modules() if isinstance(m, lnn.SignSymmetricLinear)]
    assert len(kinds) >= (1 if name == "gpt2" else 16)
    assert torch.equal(logits(model(x)), before)
    optimizer = torch.optim.Adam(model.train().parameters(), 0.003)
    losses = []
    for _ in range(30):
        loss = loss_of(model, name, x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
    "vit": ["q_proj", "up_proj", "query", "value"],
    "timm_vit": ["qkv", "fc1"],
}


def adapted(name, kind, **options):
    model = tiny(name).eval()
    present = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    target = [t for t in TARGETS[name] if t in present] or ["q_proj"]
    return lnn.adapt(model, kind, target, rank=4, alpha=6.0, verbose=False, **options)


def shaken(model):
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "delta"):
                for p in module.parameters(recurse=False):
                    p.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_what_is_saved(name, kind, tmp_path):
    model, (x, _) = tiny(name), batch(name)  # before PEFT, which imports the model's package too
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = dict(scale_convention="peft", decompose_both=True) if kind == "lokr" else {}
    model = shaken(adapted(name, kind, **options))
    if (name, kind) == ("gpt2", "lokr"):  # PEFT has LoKr of no Conv1D
        with pytest.raises(ValueError, match="convention must know .* a Conv1D of transformers: PEFT has no LoKr"):
            lnn.save_adapter(model, tmp_path)
        lnn.save_adapter(model, tmp_path / "x.safetensors", convention="lycoris")
        other = lnn.load_adapter(tiny(name).eval(), tmp_path / "x.safetensors")
        assert_relative(name, logits(other(x)), logits(model(x)), 1e-5)
        return
    lnn.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(name).eval(), tmp_path)
    out = logits(model(x))
    assert_relative(name, logits(theirs.base_model.model(x)), out, 1e-4)
    assert (out - logits(tiny(name).eval()(x))).abs().max() > 1e-3

    with torch.no_grad():  # and the other way round, with another scale
        for key, p in theirs.named_parameters():
            if "lora_" in key or "lokr_" in key:
                p.mul_(0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    config["lora_alpha" if kind == "lora" else "alpha"] = 8
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    model = lnn.load_adapter(tiny(name).eval(), tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(tiny(name).eval(), tmp_path / "theirs")
    assert_relative(name, logits(model(x)), logits(again.base_model.model(x)), 1e-4)
