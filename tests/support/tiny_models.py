"""Tiny models of `transformers` and `timm` from configs, for tests; a missing package skips by its name."""

import contextlib

import pytest
import torch

from lgkernels.core import optional


def transformers():
    """The package."""
    with contextlib.suppress(ImportError):
        optional.torchvision()  # it imports torchvision where that is, which needs its schemas beside a CPU torch
    return pytest.importorskip("transformers", reason="transformers is not installed")


def _timm():
    try:
        optional.torchvision()  # timm's imports need its schemas beside a CPU torch
    except ImportError as error:
        pytest.skip(f"torchvision is not installed ({error})")
    return pytest.importorskip("timm", reason="timm is not installed")


WIDTH, LAYERS, CLASSES, VOCABULARY, TOKENS = 32, 4, 5, 64, 8
_ENCODER = dict(
    hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64, num_labels=CLASSES
)


def gpt2(**options):
    t = transformers()
    sizes = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes | dict(bos_token_id=0, eos_token_id=0) | options))


def llama(**options):
    t = transformers()
    sizes = dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes | dict(vocab_size=VOCABULARY) | options))


def bert(**options):
    t = transformers()
    return t.BertForSequenceClassification(t.BertConfig(**_ENCODER | dict(vocab_size=VOCABULARY) | options))


def vit(**options):
    t = transformers()
    return t.ViTForImageClassification(t.ViTConfig(**_ENCODER | dict(image_size=16, patch_size=4) | options))


def timm_vit(**options):
    sizes = dict(img_size=16, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=4, num_classes=CLASSES)
    return _timm().models.vision_transformer.VisionTransformer(**sizes | options)


def eva(**options):
    sizes = dict(img_size=16, patch_size=4, embed_dim=WIDTH, depth=LAYERS, num_heads=4, num_classes=CLASSES)
    return _timm().models.eva.Eva(**sizes | dict(use_rot_pos_emb=True) | options)


def convnext(**options):
    sizes = dict(depths=(2, 2, 3, 2), dims=(8, 16, 32, 64), num_classes=CLASSES)
    return _timm().models.convnext.ConvNeXt(**sizes | options)


def swin(**options):
    sizes = dict(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=CLASSES
    )
    return _timm().models.swin_transformer.SwinTransformer(**sizes | options)


MODELS = {f.__name__: f for f in (gpt2, llama, bert, vit, timm_vit, eva, convnext, swin)}
OF_TOKENS = ("gpt2", "llama", "bert")
CAUSAL = ("gpt2", "llama")


def tiny(name, **options):
    """The model, with random weights."""
    torch.manual_seed(0)
    return MODELS[name](**options)


def batch(name, size=4):
    """(x, target): of a causal model the text itself."""
    generator = torch.Generator().manual_seed(1)
    if name in OF_TOKENS:
        x = torch.randint(1, VOCABULARY, (size, TOKENS), generator=generator)
        return x, x if name in CAUSAL else torch.arange(size) % CLASSES
    side = 32 if name in ("convnext", "swin") else 16
    return torch.randn(size, 3, side, side, generator=generator), torch.arange(size) % CLASSES


def logits(out):
    return out if isinstance(out, torch.Tensor) else out.logits


def loss_of(model, name, x, target):
    """Cross entropy of the model's output, on the next token of a causal model."""
    out = logits(model(x))
    if name in CAUSAL:
        out, target = out[:, :-1].flatten(0, 1), target[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(out, target)
