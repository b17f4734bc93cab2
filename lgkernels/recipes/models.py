"""The networks of the LLS paper as tables, built as lists of blocks for any of the rules.

Convolutions are 3x3 with padding 1; a block is convolution (or linear), batch normalisation, LeakyReLU(0.01).
`pool` is P of the block's head, `hidden` the width of the control variants' heads before they are pooled to the size
of the latents. Source: the authors' code (Apolinario, Roy, Roy, WACV 2025).
"""
from collections import namedtuple

from torch import nn

from .. import nn as lnn
from .heads import LocalClassifierHead, RandomBasisHead

Conv = namedtuple("Conv", "channels pool hidden stride max_pool", defaults=(2048, 1, False))
Separable = namedtuple("Separable", "channels pool hidden stride", defaults=(2048, 1))
Pool = namedtuple("Pool", "size")
Linear = namedtuple("Linear", "features pool hidden", defaults=(2048,))
Model = namedtuple("Model", "layers reduced_rows")

MODELS = {
    "smallconv": Model((Conv(32, 4, 512, max_pool=True), Conv(64, 2, 256, max_pool=True), Conv(128, 2, 512), Pool(2),
                        Linear(512, 512, 512)), 20),
    "smallconvl": Model((Conv(96, 4, 1536, max_pool=True), Conv(192, 2, 768, max_pool=True), Conv(512, 2), Pool(2),
                         Linear(1024, 2048)), 20),  # 1024 features pooled to 2048: each is repeated, as published
    "vgg8": Model((Conv(128, 4), Conv(256, 2, max_pool=True), Conv(256, 2), Conv(256, 2, max_pool=True),
                   Conv(512, 2, max_pool=True), Conv(512, 2), Pool(2), Linear(1024, 1024)), 100),
    "vgg11": Model((Conv(64, 4, max_pool=True), Conv(128, 2, max_pool=True), Conv(256, 2),
                    Conv(256, 2, max_pool=True), Conv(512, 2), Conv(512, 2, max_pool=True), Conv(512, 2),
                    Conv(512, 2), Pool(8), Linear(4096, 2048), Linear(4096, 2048)), 100),
    "mobilenetv1": Model((Conv(32, 8, stride=2), Separable(64, 4), Separable(128, 4, stride=2), Separable(128, 4),
                          Separable(256, 2, stride=2), Separable(256, 2), Separable(512, 2, stride=2),
                          *[Separable(512, 2)] * 5, Separable(1024, 1, stride=2), Separable(1024, 1), Pool(1)), 20),
}

RULES = ("lls", "lls-m", "lls-mxm", "lls-mxm-reduced", "lls-random", "local-classifier", "bp")
_MODULATION = {"lls-m": "vector", "lls-mxm": "matrix", "lls-mxm-reduced": "reduced"}


def build(model, rule, *, in_channels, num_classes, temperature=0.5, waveform="square", impl="auto"):
    """List of blocks and transforms for `training.BlockwiseTrainer` (rule "bp": `training.BackpropTrainer`).

    Args:
        model (str): one of `MODELS`. rule (str): one of `RULES`.
        in_channels, num_classes (int): of the data. temperature, waveform, impl: of the LLS heads.
    """
    spec = _lookup("model", model, MODELS)
    _lookup("rule", rule, RULES)
    options = {"num_classes": num_classes, "temperature": temperature}
    fused = {"waveform": waveform, "impl": impl, "modulation": _MODULATION.get(rule),
             "reduced_rows": reduced_rows(model, num_classes), **options}
    control = {"lls-random": RandomBasisHead, "local-classifier": LocalClassifierHead}.get(rule)
    blocks, width, positions = [], in_channels, 1
    for layer in spec.layers:
        if isinstance(layer, Pool):
            blocks += [nn.AdaptiveAvgPool2d(layer.size), nn.Flatten()]
            positions = layer.size**2
            continue
        if isinstance(layer, Linear):
            inputs, width, positions = width * positions, layer.features, 1
            plain = (nn.Linear(inputs, width), nn.BatchNorm1d(width))
            latents = layer.pool
        else:
            inputs, width = width, layer.channels
            latents = width * layer.pool**2
            plain = (nn.Conv2d(inputs, width, 3, layer.stride, 1), nn.BatchNorm2d(width))
        if control is not None or isinstance(layer, Separable):
            block = separable(inputs, width, layer.stride) if isinstance(layer, Separable) else nn.Sequential(
                *plain, nn.LeakyReLU())
            blocks.append(lnn.LLSHead(block, pool_size=layer.pool, **fused) if control is None else
                          control(block, pool_size=layer.pool, latents=latents, hidden=layer.hidden, **options))
            blocks += [nn.MaxPool2d(2)] if getattr(layer, "max_pool", False) else []
        elif isinstance(layer, Linear):
            blocks.append(lnn.LLSLinearBlock(inputs, width, pool_size=layer.pool, **fused))
        else:
            blocks.append(lnn.LLSConvBlock(inputs, width, 3, layer.stride, 1, pool_size=layer.pool,
                                           max_pool=layer.max_pool, **fused))
    return blocks + [lnn.ClassifierBlock(nn.Linear(width * positions, num_classes))]


def separable(inputs, outputs, stride):
    """MobileNet's block, trained as one. The depthwise padding is the stride, as in the authors' code."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=stride, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
        nn.LeakyReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU())


def reduced_rows(model, num_classes):
    """Basis rows of LLS-MxM-reduced."""
    return 100 if model == "mobilenetv1" and num_classes > 200 else MODELS[model].reduced_rows


def signal_macs(model, rule, *, in_channels, num_classes, image_size):
    """Multiply-accumulates for each sample that carry the learning signal to the layers.

    BP: the gradients to the inputs of all layers but the first. Local rules: the two products of each head with its
    basis (similarity and its adjoint), with the modulation, and gradients within a block of two convolutions.
    Weight gradients, which every rule needs, and pooling are not counted.
    """
    spec = _lookup("model", model, MODELS)
    _lookup("rule", rule, RULES)
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


def _lookup(name, value, known):
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; expected one of: {', '.join(known)}")
    return known[value] if isinstance(known, dict) else value
