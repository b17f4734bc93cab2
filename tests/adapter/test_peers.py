"""PEFT and LyCORIS load our files, and we theirs, to the same outputs."""

import warnings

import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.core import optional
from tests.adapter.common import images, net, shake
from tests.support.tolerances import assert_relative

pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
TARGETS = ["conv", "block.fc_1", "block.fc", "fc"]


@pytest.fixture
def peft():
    pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        optional.torchvision()  # which transformers imports where it is there
    except ImportError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture
def lycoris():
    found = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    found.LycorisNetwork.apply_preset(dict(target_module=["Linear", "Conv2d"], enable_conv=True, target_name=[]))
    return found


PEFT = {
    "lora": ("LoraConfig", dict(r=3, lora_alpha=5)),
    "lora, several ranks": (
        "LoraConfig",
        dict(r=3, lora_alpha=5, rank_pattern={"fc": 2}, alpha_pattern={"block.fc_1": 9}),
    ),
    "rank-stabilised": ("LoraConfig", dict(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1)),
    "modules in full": ("LoraConfig", dict(r=3, lora_alpha=5, target_modules=["conv"], modules_to_save=["norm", "fc"])),
    "lokr": ("LoKrConfig", dict(r=2, alpha=5)),
    "lokr, two full factors": ("LoKrConfig", dict(r=9, alpha=5)),
    "lokr, both decomposed": ("LoKrConfig", dict(r=1, alpha=5, decompose_both=True, decompose_factor=4)),
}


@pytest.mark.parametrize("case", PEFT)
def test_peft(peft, tmp_path, case):
    kind, options = PEFT[case]
    config = getattr(peft, kind)(**{"target_modules": TARGETS, **options})
    theirs = shake(peft.get_peft_model(net(), config)).eval()
    y = theirs(images())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lnn.load_adapter(net(), tmp_path / "theirs")
    assert (y - net()(images())).abs().max() > 0.01
    assert_relative("theirs in ours", ours.eval()(images()), y, 1e-6)
    lnn.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_relative("ours in theirs", again(images()), y, 1e-6)
    assert_relative("merged in both", again.merge_and_unload()(images()), lnn.merge(ours)(images()), 1e-6)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("lora", dict(rank=2, alpha=3.0)),
        ("lora", dict(rank=4, alpha=3.0, use_rslora=True)),
        ("lokr", dict(rank=2, alpha=3.0)),
        ("lokr", dict(rank=2, alpha=3.0, use_rslora=True)),
        ("lokr", dict(rank=16, alpha=3.0)),
        ("lokr", dict(rank=16, alpha=3.0, scale_convention="peft")),
    ],
)
def test_our_own_in_peft_and_lycoris(peft, lycoris, tmp_path, kind, options):
    model = shake(lnn.adapt(net(), kind, TARGETS, verbose=False, **options))
    y = model(images())
    lnn.save_adapter(model, tmp_path / "peft")
    assert_relative("PEFT", peft.PeftModel.from_pretrained(net(), tmp_path / "peft").eval()(images()), y, 1e-6)
    file = str(tmp_path / "x.safetensors")
    lnn.save_adapter(model, file, convention="lycoris")
    host = net()
    network, _ = lycoris.create_lycoris_from_weights(1.0, file, host)
    network.apply_to()
    network.eval()
    assert_relative("LyCORIS", host(images()), y, 1e-6)


LYCORIS = {
    "lora": dict(algo="lora", linear_dim=3, linear_alpha=5),
    "lora, other ranks in convolutions": dict(algo="lora", linear_dim=3, linear_alpha=5, conv_dim=2, conv_alpha=1),
    "lokr": dict(algo="lokr", linear_dim=2, linear_alpha=5),
    "lokr, two full factors": dict(algo="lokr", linear_dim=16, linear_alpha=5),
    "lokr, both decomposed": dict(algo="lokr", linear_dim=1, linear_alpha=5, factor=4, decompose_both=True),
    "lokr, whole": dict(algo="lokr", linear_dim=2, linear_alpha=5, full_matrix=True),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris(lycoris, tmp_path, case):
    def network():
        host = net()
        made = lycoris.create_lycoris(host, 1.0, **LYCORIS[case])
        made.apply_to()
        made.requires_grad_(True)
        return made, host

    theirs, host = network()
    shake(theirs).eval()
    y = host(images())
    theirs.save_weights(str(tmp_path / "theirs.safetensors"), None, None)
    ours = lnn.load_adapter(net(), tmp_path / "theirs.safetensors")
    assert (y - net()(images())).abs().max() > 0.01
    assert_relative("theirs in ours", ours(images()), y, 1e-6)
    lnn.save_adapter(ours, tmp_path / "ours.safetensors", convention="lycoris")
    again, host = network()
    again.eval()
    assert not again.load_weights(str(tmp_path / "ours.safetensors"))  # no key is missing, none is unknown
    assert_relative("ours in theirs", host(images()), y, 1e-6)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoKrConfig"])
def test_of_one_convention_in_the_other(peft, lycoris, tmp_path, kind):
    """PEFT's adapter in LyCORIS: scales alike, also of two full factors."""
    alpha = {"lora_alpha": 5} if kind == "LoraConfig" else {"alpha": 5}
    theirs = peft.get_peft_model(net(), getattr(peft, kind)(r=9, target_modules=TARGETS, **alpha))
    y = shake(theirs).eval()(images())
    theirs.save_pretrained(tmp_path / "peft")
    lnn.save_adapter(lnn.load_adapter(net(), tmp_path / "peft"), tmp_path / "x.safetensors", convention="lycoris")
    host = net()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), host)
    network.apply_to()
    network.eval()
    assert_relative("y", host(images()), y, 1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_gpt2(peft, tmp_path, half):
    """transformers' Conv1D, a tied head, half precision."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.2
    )

    def gpt2():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        return model.to(torch.bfloat16) if half else model

    tokens = torch.arange(24).view(2, 12)
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    assert {p.dtype for p in theirs.parameters() if p.requires_grad} == {torch.float32}
    y = shake(theirs).eval()(tokens).logits.detach()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lnn.load_adapter(gpt2(), tmp_path / "theirs")
    bound = 0.05 if half else 1e-6
    assert_relative("theirs in ours", ours(tokens).logits.float(), y.float(), bound)
    own = lnn.adapt(gpt2(), "lora", ["c_attn", "c_proj", "lm_head"], rank=2, verbose=False)
    y = shake(own)(tokens).logits.detach()
    lnn.save_adapter(own, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert_relative("ours in theirs", again(tokens).logits.float(), y.float(), bound)
    before = own.transformer.wte.weight.clone()
    assert_relative("merged", lnn.merge(own)(tokens).logits.float(), y.float(), bound)
    assert torch.equal(own.transformer.wte.weight, before)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(bias="all"), dict(lora_bias=True)])
def test_what_we_do_not_know_of_peft_is_refused(peft, tmp_path, options):
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fc"], **options))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has (use_dora=True|bias='all'|lora_bias=True), which is not supported"):
        lnn.load_adapter(net(), tmp_path)


def test_what_we_do_not_know_of_lycoris_is_refused(lycoris, tmp_path):
    for options in (
        dict(algo="loha"),
        dict(algo="lokr", use_tucker=True, linear_dim=1),
        dict(algo="lora", dora_wd=True),
    ):
        host = nn.Sequential(nn.Conv2d(16, 16, 3))
        network = lycoris.create_lycoris(host, 1.0, **options)
        network.apply_to()
        network.save_weights(str(tmp_path / "x.safetensors"), None, None)
        with pytest.raises(ValueError, match="is of no known adapter|is not supported"):
            lnn.load_adapter(nn.Sequential(nn.Conv2d(16, 16, 3)), tmp_path / "x.safetensors")
