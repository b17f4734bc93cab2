"""Blocks of LLS from the layers of an existing model: what `convert(model, "lls")` does."""

from typing import Any

from torch import nn

from ..core import constructors
from .chain import chain_of
from .lls import LLSConvBlock, LLSLinearBlock
from .lls_head import HEAD_DEFAULTS, LLSHead
from .local_loss import ClassifierBlock

OPTIONS = ("num_classes", "pool_size", *HEAD_DEFAULTS)

_CONVOLUTIONS = (nn.Conv2d, nn.Conv1d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LATENTS = 2048  # at most so many, in the authors' tables


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _is_activation(module: nn.Module | None) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())  # type: ignore[union-attr]


def _halves(module: nn.Module | None) -> bool:
    """The max-pool that a block has in it."""
    if not isinstance(module, (nn.MaxPool2d, nn.MaxPool1d)):
        return False
    sizes = [n if isinstance(n, int) else set(n) for n in (module.kernel_size, module.stride)]
    plain = (module.padding, module.dilation, module.ceil_mode) in ((0, 1, False), ((0, 0), (1, 1), False))
    return all(n in (2, {2}) for n in sizes) and plain and not module.return_indices


def _pool(channels: int, power: int) -> int:
    """P of the authors' tables: the largest power of two of which channels * P^power latents are at most 2048."""
    p = 1
    while channels * (2 * p) ** power <= LATENTS:
        p *= 2
    return p


def _channels(module: nn.Module) -> int:
    sizes = [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for m in module.modules()
        if isinstance(m, (nn.Linear, *_CONVOLUTIONS))
    ]
    return sizes[-1] if sizes else LATENTS


class _Parts:
    """The parts of a model, taken one after the other."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts, self.at = parts, 0

    def next_if(self, kind: Any) -> nn.Module | None:
        if self.at < len(self.parts) and kind(self.parts[self.at]):
            self.at += 1
            return self.parts[self.at - 1]
        return None


def _block(layer: nn.Module, following: _Parts, pool_size: int | None, options: dict[str, Any]) -> nn.Module:
    norm = following.next_if(lambda m: isinstance(m, _NORMS))
    act = following.next_if(_is_activation)
    activation: Any = "identity" if act is None else act
    if isinstance(layer, nn.Linear):
        size = pool_size or min(layer.out_features, LATENTS)
        return LLSLinearBlock.from_layers(layer, norm, activation=activation, pool_size=size, **options)
    convolution: Any = layer
    size = pool_size or _pool(convolution.out_channels, 2 if isinstance(layer, nn.Conv2d) else 1)
    pool = following.next_if(_halves) is not None
    return LLSConvBlock.from_layers(layer, norm, activation=activation, pool_size=size, max_pool=pool, **options)


def convert_lls(
    model: nn.Module, *, num_classes: int | None = None, pool_size: int | None = None, **options: Any
) -> nn.Sequential:
    """The model as blocks for `BlockwiseTrainer`; without a target they are the model."""
    if num_classes is None:
        raise TypeError("num_classes must be given with rule='lls', got None: it is that of the blocks' heads")
    options["num_classes"] = constructors.size("num_classes", num_classes)
    pool_size = pool_size if pool_size is None else constructors.size("pool_size", pool_size)
    parts = chain_of(model)
    if parts is None:
        raise TypeError(
            f"model must apply its modules one after the other, got {type(model).__name__}, which does not: cut it by "
            "lgkernels.training.split_blocks, and wrap each unit in nn.LLSHead"
        )
    training = [i for i, part in enumerate(parts) if _trains(part)]
    if not training or not isinstance(parts[training[-1]], (nn.Linear, *_CONVOLUTIONS)):
        raise TypeError(
            f"model must end in an nn.Linear or a convolution that classifies, got {type(model).__name__} without"
        )
    end = training[-1]
    body, blocks = _Parts(parts[:end]), []
    while body.at < end:
        part = body.parts[body.at]
        body.at += 1
        if isinstance(part, (nn.Linear, *_CONVOLUTIONS)) and _trains(part):
            blocks.append(_block(part, body, pool_size, options))
        elif _trains(part):
            size = pool_size or _pool(_channels(part), 2)
            blocks.append(LLSHead(part, pool_size=size, **options))
        else:
            blocks.append(part)
    tail = parts[end:]
    return nn.Sequential(*blocks, ClassifierBlock(tail[0] if len(tail) == 1 else nn.Sequential(*tail)))


def summary(blocks: nn.Sequential) -> str:
    lines = [f"lls: {sum(isinstance(b, (LLSConvBlock, LLSLinearBlock, LLSHead)) for b in blocks)} blocks"]
    for name, block in blocks.named_children():
        if isinstance(block, (LLSConvBlock, LLSLinearBlock)):
            why = block.unfused()
            how = "fused" if why is None else f"unfused: {why}"
            lines.append(
                f"  {name}  {type(block).__name__} of {type(block.layer).__name__}, P = {block.pool_size}, {how}"
            )
        elif isinstance(block, LLSHead):
            lines.append(
                f"  {name}  LLSHead of {type(block.block).__name__}, P = {block.pool_size}, unfused: a head alone"
            )
    return "\n".join(lines)
