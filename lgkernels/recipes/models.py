"""Networks as lists of blocks, for any of the rules.

`MODELS`, as tables: those of the LLS paper. Convolutions are 3x3 with padding 1; a block is convolution (or linear),
batch normalisation, LeakyReLU(0.01). `pool` is P of the block's head, `hidden` the width of the control variants'
heads before they are pooled to the size of the latents. Source: the authors' code (Apolinario, Roy, Roy, WACV 2025).

`NETWORKS`, as functions, for the rules without local heads: see `networks`.
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import nn as lnn
from . import options, rules
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


class Classifier(NamedTuple):
    """The linear layer at the end of every table."""

    features: int


class Place(NamedTuple):
    """A layer of a table with the sizes that it has there."""

    layer: Any
    inputs: int  # channels, or features
    outputs: int
    latents: int = 0  # of its local head, which sees the activation pooled
    size: int = 1  # height and width of the output, before the max-pool


def walk(model: str, in_channels: int, num_classes: int, image_size: int = 1) -> Iterator[Place]:
    """The layers of a table of `MODELS`, classifier included. Without an image size all but `Place.size` is right."""
    width, positions, size = in_channels, 1, image_size
    for layer in MODELS[model].layers:
        if isinstance(layer, Pool):
            positions, size = layer.size**2, layer.size
            yield Place(layer, width, width, size=size)
            continue
        inputs, width, positions = width * positions, layer[0], 1
        if isinstance(layer, Linear):
            yield Place(layer, inputs, width, latents=layer.pool)
            continue
        padding = layer.stride if isinstance(layer, Separable) else 1
        size = (size + 2 * padding - 3) // layer.stride + 1
        yield Place(layer, inputs, width, latents=width * layer.pool**2, size=size)
        if getattr(layer, "max_pool", False):
            size //= 2
    yield Place(Classifier(num_classes), width * positions, num_classes)


def build(
    model: str,
    rule: str,
    *,
    in_channels: int,
    num_classes: int,
    temperature: float = 0.5,
    waveform: str = "square",
    impl: str = "auto",
    seed: int = 0,
) -> list[nn.Module]:
    """List of blocks and transforms for the rule's trainer.

    Args:
        model (str): one of `MODELS`, or of `NETWORKS` where the rule needs no local heads. rule (str): the name of a
            rule that starts from random weights, see `rules`.
        in_channels, num_classes (int): of the data. temperature, waveform: of the rules that have these options.
        impl (str): of the rule's kernels. seed (int): of FA's and sign-symmetry's random feedback; the last layer
            has the exact gradient.
    """
    given = {"temperature": temperature, "waveform": waveform}
    task = _task(model, rule, given, in_channels=in_channels, num_classes=num_classes, seed=seed, impl=impl)
    return task.rule.build(task)


def signal_macs(model: str, rule: str, *, in_channels: int, num_classes: int, image_size: int) -> int:
    """Multiply-accumulates for each sample that carry the learning signal to the layers, by the rule's own count.

    Weight gradients, which every rule needs, and pooling are not counted.
    """
    task = _task(model, rule, {}, in_channels=in_channels, num_classes=num_classes)
    if task.rule.measures.signal_macs is None:
        raise ValueError(f"rule {rule!r} has no count of its learning signal")
    return task.rule.measures.signal_macs(task, image_size)


def _task(model: str, rule: str, given: dict[str, Any], **sizes: Any) -> rules.Task:
    options.known("rule", rule, [name for name, found in rules.found().items() if found.starts != "network"])
    options.known("model", model, [*MODELS, *NETWORKS])
    record = rules.get(rule)
    if record.heads and model not in MODELS:
        raise ValueError(f"rule {rule!r} needs a model with local heads ({', '.join(MODELS)}), got {model!r}")
    return rules.Task(record, options.make(record.options, given), model, **sizes)


def with_heads(
    model: str,
    in_channels: int,
    num_classes: int,
    *,
    temperature: float = 0.5,
    waveform: str = "square",
    impl: str = "auto",
    modulation: str | None = None,
    control: Callable[..., nn.Module] | None = None,
) -> list[nn.Module]:
    """A table's network, an LLS head in each block, or what `control` makes of it."""
    common = {"num_classes": num_classes, "temperature": temperature}
    fused = {"waveform": waveform, "impl": impl, "modulation": modulation, **common}
    fused["reduced_rows"] = reduced_rows(model, num_classes)
    blocks: list[nn.Module] = []
    for place in walk(model, in_channels, num_classes):
        layer, inputs, outputs = place[:3]
        if isinstance(layer, Pool):
            blocks += _pooling(layer)
        elif isinstance(layer, Classifier):
            blocks.append(lnn.ClassifierBlock(nn.Linear(inputs, outputs)))
        elif control is not None:
            head = {"pool_size": layer.pool, "latents": place.latents, "hidden": layer.hidden}
            blocks.append(control(_unit(place), **head, **common))
            blocks += [nn.MaxPool2d(2)] if getattr(layer, "max_pool", False) else []
        elif isinstance(layer, Separable):
            blocks.append(lnn.LLSHead(_unit(place), pool_size=layer.pool, **fused))
        elif isinstance(layer, Linear):
            blocks.append(lnn.LLSLinearBlock(inputs, outputs, pool_size=layer.pool, **fused))
        else:
            pools = {"pool_size": layer.pool, "max_pool": layer.max_pool}
            blocks.append(lnn.LLSConvBlock(inputs, outputs, 3, layer.stride, 1, **pools, **fused))
    return blocks


def usual(model: str, in_channels: int, num_classes: int) -> list[nn.Module]:
    """A model for back-propagation. A table has its heads, which take no part: it is the network of the local rules."""
    if model in NETWORKS:
        return NETWORKS[model](in_channels, num_classes)
    return with_heads(model, in_channels, num_classes)


def plain(model: str, in_channels: int, num_classes: int) -> list[nn.Module]:
    """A model without heads. A max-pool belongs to its block, so direct signals enter after it."""
    if model in NETWORKS:
        return NETWORKS[model](in_channels, num_classes)
    blocks: list[nn.Module] = []
    for place in walk(model, in_channels, num_classes):
        if isinstance(place.layer, Pool):
            blocks += _pooling(place.layer)
        elif isinstance(place.layer, Classifier):
            blocks.append(nn.Linear(place.inputs, place.outputs))
        else:
            blocks.append(_unit(place))
            if getattr(place.layer, "max_pool", False):
                blocks[-1].append(nn.MaxPool2d(2))
    return blocks


def _pooling(layer: Pool) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(layer.size), nn.Flatten()]


def _unit(place: Place) -> nn.Sequential:
    """Layer, batch normalisation, LeakyReLU."""
    layer, inputs, outputs = place[:3]
    if isinstance(layer, Separable):
        return separable(inputs, outputs, layer.stride)
    if isinstance(layer, Linear):
        return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU())
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, layer.stride, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU())


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """MobileNet's block, trained as one. The depthwise padding is the stride, as in the authors' code."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=stride, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(),
    )


def reduced_rows(model: str, num_classes: int) -> int:
    """Basis rows of LLS-MxM-reduced."""
    return 100 if model == "mobilenetv1" and num_classes > 200 else MODELS[model].reduced_rows


def gradient_macs(task: rules.Task, image_size: int, *, cut: bool = False) -> tuple[int, list[int]]:
    """Multiply-accumulates of the gradients to the layers' inputs, for each sample, and the size of each hidden block's
    output. `cut`: no gradient goes from block to block. Counted on the network itself, on the device without data."""
    layers, sizes = [], []
    with torch.device("meta"), torch.enable_grad():
        blocks = plain(*task.size)
        for module in (m for block in blocks for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            module.register_forward_hook(lambda layer, inputs, output: layers.append((layer, inputs[0], output)))
        x = torch.zeros(2, task.in_channels, image_size, image_size)
        hidden = [block for block in blocks if list(block.parameters())][:-1]
        for block in blocks:
            x = block(x.detach() if cut else x)
            if block in hidden:
                sizes.append(math.prod(x.shape[1:]))
    total = 0
    for layer, x, output in layers:
        if x.requires_grad:  # the first layer of the network, or of a cut block, needs no gradient to its input
            total += layer.weight.numel() * (output[0].numel() // layer.weight.shape[0])
    return total, sizes
