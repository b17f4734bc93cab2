"""Networks as lists of blocks, for any of the rules.

`MODELS`, as tables: those of the LLS paper. Convolutions are 3x3 with padding 1; a block is convolution (or linear),
batch normalisation, LeakyReLU(0.01). `pool` is P of the block's head, `hidden` the width of the control variants'
heads before they are pooled to the size of the latents. Source: the authors' code (Apolinario, Roy, Roy, WACV 2025).

`NETWORKS`, as functions, for the rules without local heads: see `networks`.
"""

import math
from collections import namedtuple

import torch
from torch import nn

from .. import nn as lnn
from .heads import LocalClassifierHead, RandomBasisHead
from .networks import NETWORKS

Conv = namedtuple("Conv", "channels pool hidden stride max_pool", defaults=(2048, 1, False))
Separable = namedtuple("Separable", "channels pool hidden stride", defaults=(2048, 1))
Pool = namedtuple("Pool", "size")
Linear = namedtuple("Linear", "features pool hidden", defaults=(2048,))
Model = namedtuple("Model", "layers reduced_rows")

MODELS = {
    "smallconv": Model(
        (
            Conv(32, 4, 512, max_pool=True),
            Conv(64, 2, 256, max_pool=True),
            Conv(128, 2, 512),
            Pool(2),
            Linear(512, 512, 512),
        ),
        20,
    ),
    "smallconvl": Model(
        (Conv(96, 4, 1536, max_pool=True), Conv(192, 2, 768, max_pool=True), Conv(512, 2), Pool(2), Linear(1024, 2048)),
        20,
    ),  # 1024 features pooled to 2048: each is repeated, as published
    "vgg8": Model(
        (
            Conv(128, 4),
            Conv(256, 2, max_pool=True),
            Conv(256, 2),
            Conv(256, 2, max_pool=True),
            Conv(512, 2, max_pool=True),
            Conv(512, 2),
            Pool(2),
            Linear(1024, 1024),
        ),
        100,
    ),
    "vgg11": Model(
        (
            Conv(64, 4, max_pool=True),
            Conv(128, 2, max_pool=True),
            Conv(256, 2),
            Conv(256, 2, max_pool=True),
            Conv(512, 2),
            Conv(512, 2, max_pool=True),
            Conv(512, 2),
            Conv(512, 2),
            Pool(8),
            Linear(4096, 2048),
            Linear(4096, 2048),
        ),
        100,
    ),
    "mobilenetv1": Model(
        (
            Conv(32, 8, stride=2),
            Separable(64, 4),
            Separable(128, 4, stride=2),
            Separable(128, 4),
            Separable(256, 2, stride=2),
            Separable(256, 2),
            Separable(512, 2, stride=2),
            *[Separable(512, 2)] * 5,
            Separable(1024, 1, stride=2),
            Separable(1024, 1),
            Pool(1),
        ),
        20,
    ),
}

LOCAL_RULES = ("lls", "lls-m", "lls-mxm", "lls-mxm-reduced", "lls-random", "local-classifier")
FEEDBACK_RULES = ("fa", "usf", "frsf", "brsf", "signed-init")
DIRECT_RULES = ("dfa", "sdfa", "drtp")
RULES = (*LOCAL_RULES, *FEEDBACK_RULES, *DIRECT_RULES, "bp")
_MODULATION = {"lls-m": "vector", "lls-mxm": "matrix", "lls-mxm-reduced": "reduced"}


def build(model, rule, *, in_channels, num_classes, temperature=0.5, waveform="square", impl="auto", seed=0):
    """List of blocks and transforms for the rule's trainer, see `loop.trainer`.

    Args:
        model (str): one of `MODELS`, or of `NETWORKS` (not for `LOCAL_RULES`). rule (str): one of `RULES`.
        in_channels, num_classes (int): of the data. temperature, waveform: of the LLS heads.
        impl (str): of the rule's kernels. seed (int): of FA's and sign-symmetry's random feedback; the last layer
            has the exact gradient.
    """
    _lookup("rule", rule, RULES)
    if model in NETWORKS:
        if rule in LOCAL_RULES:
            raise ValueError(f"rule {rule!r} needs a model with local heads ({', '.join(MODELS)}), got {model!r}")
        return _converted(NETWORKS[model](in_channels, num_classes), rule, seed, impl)
    spec = _lookup("model", model, {**MODELS, **NETWORKS})
    if rule in FEEDBACK_RULES or rule in DIRECT_RULES:
        return _converted(_plain(spec, in_channels, num_classes), rule, seed, impl)
    options = {"num_classes": num_classes, "temperature": temperature}
    fused = {
        "waveform": waveform,
        "impl": impl,
        "modulation": _MODULATION.get(rule),
        "reduced_rows": reduced_rows(model, num_classes),
        **options,
    }
    control = {"lls-random": RandomBasisHead, "local-classifier": LocalClassifierHead}.get(rule)
    blocks, width, positions = [], in_channels, 1
    for layer in spec.layers:
        if isinstance(layer, Pool):
            blocks += [nn.AdaptiveAvgPool2d(layer.size), nn.Flatten()]
            positions = layer.size**2
            continue
        if isinstance(layer, Linear):
            inputs, width, positions = width * positions, layer.features, 1
            latents = layer.pool
        else:
            inputs, width = width, layer.channels
            latents = width * layer.pool**2
        if control is not None or isinstance(layer, Separable):
            block = _unit(layer, inputs)
            blocks.append(
                lnn.LLSHead(block, pool_size=layer.pool, **fused)
                if control is None
                else control(block, pool_size=layer.pool, latents=latents, hidden=layer.hidden, **options)
            )
            blocks += [nn.MaxPool2d(2)] if getattr(layer, "max_pool", False) else []
        elif isinstance(layer, Linear):
            blocks.append(lnn.LLSLinearBlock(inputs, width, pool_size=layer.pool, **fused))
        else:
            blocks.append(
                lnn.LLSConvBlock(
                    inputs, width, 3, layer.stride, 1, pool_size=layer.pool, max_pool=layer.max_pool, **fused
                )
            )
    return blocks + [lnn.ClassifierBlock(nn.Linear(width * positions, num_classes))]


def _unit(layer, inputs):
    """Layer, batch normalisation, LeakyReLU."""
    if isinstance(layer, Separable):
        return separable(inputs, layer.channels, layer.stride)
    if isinstance(layer, Linear):
        return nn.Sequential(nn.Linear(inputs, layer.features), nn.BatchNorm1d(layer.features), nn.LeakyReLU())
    return nn.Sequential(
        nn.Conv2d(inputs, layer.channels, 3, layer.stride, 1), nn.BatchNorm2d(layer.channels), nn.LeakyReLU()
    )


def _plain(spec, in_channels, num_classes):
    """The network of a table without heads. A max-pool belongs to its block, so direct signals enter after it."""
    blocks, width, positions = [], in_channels, 1
    for layer in spec.layers:
        if isinstance(layer, Pool):
            blocks += [nn.AdaptiveAvgPool2d(layer.size), nn.Flatten()]
            positions = layer.size**2
            continue
        blocks.append(_unit(layer, width * positions))
        if getattr(layer, "max_pool", False):
            blocks[-1].append(nn.MaxPool2d(2))
        width, positions = layer[0], 1
    return [*blocks, nn.Linear(width * positions, num_classes)]


def _converted(blocks, rule, seed, impl):
    if rule in FEEDBACK_RULES:
        signs = {"signs": "formula"} if rule == "signed-init" else {}  # nothing is trained yet
        lnn.convert(nn.Sequential(*blocks), rule.replace("-", "_"), seed=seed, impl=impl, verbose=False, **signs)
    return blocks


def separable(inputs, outputs, stride):
    """MobileNet's block, trained as one. The depthwise padding is the stride, as in the authors' code."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=stride, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(),
    )


def reduced_rows(model, num_classes):
    """Basis rows of LLS-MxM-reduced."""
    return 100 if model == "mobilenetv1" and num_classes > 200 else MODELS[model].reduced_rows


def signal_macs(model, rule, *, in_channels, num_classes, image_size):
    """Multiply-accumulates for each sample that carry the learning signal to the layers.

    BP, FA and sign-symmetry: the gradients to the inputs of all layers but the first. DFA: the projections of the
    error to each block (DRTP: none, it gathers), and gradients within a block of two convolutions. Local rules: the
    two products of each head with its basis (similarity and its adjoint), with the modulation, and gradients within a
    block. Weight gradients, which every rule needs, and pooling are not counted.
    """
    _lookup("rule", rule, RULES)
    if model in NETWORKS or rule in FEEDBACK_RULES or rule in DIRECT_RULES:
        return _macs_of_gradients(model, rule, in_channels, num_classes, image_size)
    spec = _lookup("model", model, {**MODELS, **NETWORKS})
    rows = reduced_rows(model, num_classes) if rule == "lls-mxm-reduced" else num_classes
    modulation = {"lls-m": num_classes, "lls-mxm": num_classes**2, "lls-mxm-reduced": rows * num_classes}.get(rule, 0)
    through, heads, within = [], 0, 0
    size, width, positions = image_size, in_channels, 1
    for layer in spec.layers:
        if isinstance(layer, Pool):
            positions = layer.size**2
            continue
        if isinstance(layer, Linear):
            through.append(width * positions * layer.features)
            width, positions, latents = layer.features, 1, layer.pool
        else:
            padding = layer.stride if isinstance(layer, Separable) else 1
            size = (size + 2 * padding - 3) // layer.stride + 1
            if isinstance(layer, Separable):
                through.append(9 * width * size**2)
                within += width * layer.channels * size**2
                through.append(width * layer.channels * size**2)
            else:
                through.append(9 * width * layer.channels * size**2)
            width, latents = layer.channels, layer.channels * layer.pool**2
            size = size // 2 if getattr(layer, "max_pool", False) else size
        heads += 2 * (rows * latents + modulation)
    through.append(width * positions * num_classes)
    return sum(through[1:]) if rule == "bp" else heads + within


def _macs_of_gradients(model, rule, in_channels, num_classes, image_size):
    """Counted on the network itself, on the device without data."""
    direct, total, layers = rule in DIRECT_RULES, 0, []
    with torch.device("meta"), torch.enable_grad():
        blocks = build(model, "dfa" if direct else "bp", in_channels=in_channels, num_classes=num_classes)
        for module in (m for block in blocks for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            module.register_forward_hook(lambda layer, inputs, output: layers.append((layer, inputs[0], output)))
        x = torch.zeros(2, in_channels, image_size, image_size)
        hidden = [block for block in blocks if list(block.parameters())][:-1]
        for block in blocks:
            x = block(x.detach() if direct else x)
            if block in hidden and direct and rule != "drtp":
                total += num_classes * math.prod(x.shape[1:])
    for layer, x, output in layers:
        if x.requires_grad:
            total += layer.weight.numel() * (output[0].numel() // layer.weight.shape[0])
    return total


def _lookup(name, value, known):
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; expected one of: {', '.join(known)}")
    return known[value] if isinstance(known, dict) else value
