"""Cut a model into consecutive units, each to be trained by a local loss of its own."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..core import checks, constructors
from ..nn.layer_list import starts_of
from .recognition import Module, _copied, chain

__all__ = ["split_blocks"]


# -- saved bytes --------------------------------------------------------------------------------------------------


def to_meta(module: Module) -> Module:
    """A copy of `module` without memory: same structure, parameters and buffers on the meta device."""
    return _copied(module, lambda t: torch.empty_like(t, device="meta", requires_grad=False))


class _Saved:
    """Distinct storages that autograd keeps, parameters and buffers left out: {storage: bytes}."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.excluded = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}
        self.bytes: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.excluded:
            self.bytes[storage._cdata] = storage.nbytes()
            self.alive.append(tensor)  # an address is an identity only while the storage lives
        return tensor

    def run(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            out = module(x)
        self.alive.append(out)
        return out


def saved_bytes(modules: Sequence[nn.Module], x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """`(total, out)`: bytes that autograd keeps for a backward through `modules` from the input x (detached here); each
    storage counts once. On the meta device this costs no memory."""
    saved, x = _Saved(modules), x.detach()
    saved.alive.append(x)
    for module in modules:
        x = saved.run(module, x)
    return sum(saved.bytes.values()), x


def unit_bytes(units: Iterable[Any], x: torch.Tensor) -> list[int]:
    """[bytes that autograd keeps for each unit]: units' inputs are detached, so each keeps its own input."""
    result = []
    for unit in units:
        total, x = saved_bytes([unit] if isinstance(unit, nn.Module) else unit, x)
        result.append(total)
    return result


def _balanced(parts: Any, count: int, x: torch.Tensor) -> list[int]:
    """Boundaries of `count` consecutive groups with the smallest largest group (sets of storages, one pass)."""
    saved, kept = _Saved(parts), []
    for part in parts:
        before, saved.bytes = saved.bytes, {}
        x = saved.run(part, x)
        kept.append(saved.bytes)
        saved.bytes = before
    n = len(parts)
    cost = [[0] * (n + 1) for _ in range(n)]
    for i in range(n):
        union: dict[int, int] = {}
        for j in range(i, n):
            union |= kept[j]
            cost[i][j + 1] = sum(union.values())
    best: list[list[float]] = [[float("inf")] * (n + 1) for _ in range(count + 1)]
    cut = [[0] * (n + 1) for _ in range(count + 1)]
    best[0][0] = 0
    for k in range(1, count + 1):
        for j in range(k, n + 1):
            for i in range(k - 1, j):
                value = max(best[k - 1][i], cost[i][j])
                if value < best[k][j]:
                    best[k][j], cut[k][j] = value, i
    ends: list[int] = []
    j = n
    for k in range(count, 0, -1):
        ends.append(j)
        j = cut[k][j]
    return ends[::-1]


def split_blocks(
    model: nn.Module,
    units: int | list[int] | tuple[int, ...] = 4,
    *,
    balance: Literal["memory", "parts"] = "memory",
    input: torch.Tensor | None = None,
    overlap_blocks: int = 0,
    path: str | Sequence[str] | None = None,
) -> list[nn.Sequential]:
    """Cut `model` into consecutive units; applied one after the other they are the model, with its own parameters.

    An ``nn.Sequential``, a ResNet or vision transformer of torchvision or timm, and any model with a list of layers
    (decoders and encoders of transformers; timm's ConvNeXt, Swin, ...): then the first part is all that comes before
    the layers, the last all that comes behind, and what the layers are called with beside their input (masks, position
    embeddings) is kept of the first unit's forward, so the units run in order. What was recognised is run once beside
    the model on the same random input; a model that is another function than its parts raises.

    Args:
        model (nn.Module): see :func:`lgkernels.training.recognition.chain`.
        units (int or list of ints): how many, or the numbers of the parts (of :func:`chain`, from 0) at which units but
            the first begin.
        balance (str): ``"memory"``: the largest unit's saved bytes are smallest; ``"parts"``: equally many parts.
        input (Tensor): for ``"memory"``: an example batch; only its shape and dtype are used.
        overlap_blocks (int): LoCo: every unit but the last also lists the first so many parts of the next one (all,
            where it has fewer), which both units' losses train. A list of parts can then not simply be applied in
            sequence.
        path (str, or several): the qualified name of the list of layers ("transformer.h", "model.layers"); several
            lists are one, in that order. None: found.

    Returns:
        list of nn.Sequential: the units. The stem joins the first part with it, the classifier the last.

    Raises: ValueError, TypeError naming the argument.

    Example:
        >>> import torch
        >>> from lgkernels.training import split_blocks
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
        >>> [len(unit) for unit in split_blocks(model, 3, input=torch.zeros(4, 8))]
        [2, 2, 2]
    """
    constructors.module("model", model)
    checks.choice("balance", balance, ("memory", "parts"))
    overlap_blocks = constructors.size("overlap_blocks", overlap_blocks, 0)
    if input is not None:
        checks.tensor("input", input)
    parts = chain(model, input, path)
    return cut(parts, units, balance=balance, input=input, overlap_blocks=overlap_blocks)


def cut(
    parts: list[nn.Module],
    units: int | list[int] | tuple[int, ...],
    *,
    balance: str = "memory",
    input: torch.Tensor | None = None,
    overlap_blocks: int = 0,
) -> list[nn.Sequential]:
    """:func:`split_blocks` of the parts of a model."""
    if not isinstance(units, (list, tuple)):
        units = constructors.size("units", units)
    starts = starts_of(units, len(parts), "parts")
    if balance == "memory" and not isinstance(units, (list, tuple)):
        if input is None:
            raise ValueError('input must be an example batch for balance="memory", got None')
        ends = _balanced(to_meta(nn.ModuleList(parts)), len(starts), input.detach().to("meta"))
        starts = [0, *ends[:-1]]
    ends = [*starts[1:], len(parts)]
    limits = [*ends[1:], len(parts)]  # where the next unit ends
    return [nn.Sequential(*parts[a : min(b + overlap_blocks, limit)]) for a, b, limit in zip(starts, ends, limits)]
