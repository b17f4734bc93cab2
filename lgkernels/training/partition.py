"""Cut a model into consecutive units, each to be trained by a local loss of its own."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from ..core import checks, constructors

__all__ = ["split_blocks"]

Module = TypeVar("Module", bound=nn.Module)


class Stage(nn.Module):
    """One indivisible part of a model: named modules that it owns, and a function of them."""

    def __init__(
        self, function: Callable[[Any, torch.Tensor], torch.Tensor], **modules: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, nn.Parameter):
                self.register_parameter(name, module)
            else:
                setattr(self, name, module)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def _flat(module: nn.Module) -> list[nn.Module]:
    """Children of nested plain `nn.Sequential`s, in order; one with a forward or hooks of its own stays whole."""
    if type(module) is nn.Sequential and _plain(module):
        return [leaf for child in module for leaf in _flat(child)]
    return [module]


def _plain(module: nn.Module) -> bool:
    """Whether nothing was set on the instance that changes what a call of it does."""
    return "forward" not in vars(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _has(model: nn.Module, *names: str) -> bool:
    return all(hasattr(model, name) for name in names)


def _resnet(m: Any) -> list[nn.Module]:
    """torchvision's and timm's ResNets."""
    act = m.relu if hasattr(m, "relu") else m.act1
    stem = nn.Sequential(m.conv1, m.bn1, act, m.maxpool)
    pool = m.avgpool if hasattr(m, "avgpool") else m.global_pool
    rate = getattr(m, "drop_rate", 0.0)  # timm's: a dropout that is no module

    def classify(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(s.pool(x), 1)
        # fc's mode is what the model's train() and the unit's both reach
        return s.fc(nn.functional.dropout(x, rate, s.fc.training) if rate else x)

    head = Stage(classify, pool=pool, fc=m.fc)
    return [stem, *(block for layer in (m.layer1, m.layer2, m.layer3, m.layer4) for block in layer), head]


def _torchvision_vit(m: Any) -> list[nn.Module]:
    def embed(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([s.class_token.expand(x.shape[0], -1, -1), x], 1)
        return s.dropout(x + s.pos_embedding)

    first = Stage(
        embed,
        conv_proj=m.conv_proj,
        class_token=m.class_token,
        pos_embedding=m.encoder.pos_embedding,
        dropout=m.encoder.dropout,
    )
    last = Stage(lambda s, x: s.heads(s.ln(x)[:, 0]), ln=m.encoder.ln, heads=m.heads)
    return [first, *m.encoder.layers, last]


def _share(m: Any, children: Sequence[str], parameters: bool) -> nn.Module:
    """`m` with these of its modules and parameters alone: its class's methods and its settings, to call piecemeal."""
    share = copy.copy(m)
    share._modules = {name: m._modules[name] for name in children}
    share._parameters, share._buffers = (m._parameters, m._buffers) if parameters else ({}, {})
    return share


def _is_timm_vit(m: Any) -> bool:
    """timm's class, or one derived from it that goes from the embedding to the head as that does."""
    base: Any = next(
        (
            c
            for c in type(m).__mro__
            if (c.__module__, c.__name__) == ("timm.models.vision_transformer", "VisionTransformer")
        ),
        None,
    )
    return base is not None and type(m).forward_features is base.forward_features


def _timm_vit(m: Any) -> list[nn.Module]:
    def embed(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.vit.norm_pre(s.vit.patch_drop(s.vit._pos_embed(s.vit.patch_embed(x))))

    def classify(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.vit.training = s.vit.head.training  # what the model's train() and the unit's both reach
        return s.vit.forward_head(s.vit.norm(x))

    names = list(m._modules)
    after = names.index("blocks")
    first = Stage(embed, vit=_share(m, names[:after], parameters=True))
    last = Stage(classify, vit=_share(m, names[after + 1 :], parameters=False))
    return [first, *m.blocks, last]


def _is_sequence(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward and _plain(model)


def chain(model: nn.Module, input: torch.Tensor | None = None) -> list[nn.Module]:
    """The indivisible parts of `model`, applied one after the other: torchvision's and timm's ResNets and vision
    transformers, or an `nn.Sequential` (nested ones are opened). They share the model's parameters.

    What is recognised by its attributes is run once beside its parts (see :func:`_compare`).

    Args:
        input (Tensor, optional): an example batch, whose shape is used; without it that of an ordinary image.

    Raises: TypeError for any other model.
    """
    parts = parts_of(model)
    if not _is_sequence(model) and not _is_torchvisions(model):
        _compare(model, input)
    return parts


def parts_of(model: nn.Module) -> list[nn.Module]:
    """As :func:`chain`, of a model that has been compared with its parts."""
    if _is_sequence(model):
        return [leaf for child in cast(nn.Sequential, model) for leaf in _flat(child)]
    if _has(model, "conv1", "bn1", "maxpool", "layer1", "layer4", "fc"):
        return _resnet(model)
    if _has(model, "conv_proj", "class_token", "encoder", "heads"):
        return _torchvision_vit(model)
    if _is_timm_vit(model):
        return _timm_vit(model)
    raise TypeError(
        f"model must be an nn.Sequential, or a ResNet or vision transformer of torchvision or timm, got "
        f"{type(model).__name__}: write it as an nn.Sequential of its parts"
    )


def _is_torchvisions(model: nn.Module) -> bool:
    """An unchanged class of torchvision: its parts are known to be right, and it may be large."""
    kinds = {("torchvision.models.resnet", "ResNet"), ("torchvision.models.vision_transformer", "VisionTransformer")}
    return (type(model).__module__, type(model).__name__) in kinds and _plain(model)


def _example(model: Any, input: torch.Tensor | None) -> torch.Tensor:
    """Two random samples, of the shape of `input` or of an image."""
    if input is not None:
        return torch.randn(2, *input.shape[1:])
    first = getattr(model, "conv1", getattr(model, "conv_proj", getattr(model, "patch_embed", None)))
    channels = next((m.in_channels for m in first.modules() if isinstance(m, nn.Conv2d)), 3) if first is not None else 3
    size = getattr(model, "image_size", getattr(getattr(model, "patch_embed", None), "img_size", 224))
    return torch.randn(2, channels, *(size if isinstance(size, tuple) else (size, size)))


@torch.no_grad()
def _compare(model: nn.Module, input: torch.Tensor | None) -> None:
    """Raise TypeError where the parts in turn are another function than the model.

    Both run on a copy of it with random weights (a layer that starts at 0 hides what comes before it), in evaluation
    and in training mode from the same state of the random numbers: a dropout that is left out shows in the latter.
    """
    what = f"model ({type(model).__name__}) looks like a ResNet or vision transformer of torchvision or timm"
    cure = "write it as an nn.Sequential of its parts, in the order of its forward"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        duplicate = _copied(model, _random_like)
        x = _example(model, input)
        parts = parts_of(duplicate)
        for mode in (False, True):
            duplicate.train(mode)
            for part in parts:
                part.train(mode)
            outputs = []
            for run in (lambda x: duplicate(x), lambda x: _applied(parts, x)):
                torch.manual_seed(1)
                try:
                    outputs.append(run(x))
                except Exception as error:
                    raise TypeError(
                        f"{what}, and could not be tried on an input of shape {tuple(x.shape)} "
                        f"({type(error).__name__}: {error}): give an input that fits, or {cure}"
                    ) from error
            mine, theirs = outputs
            same = isinstance(mine, torch.Tensor) and mine.shape == theirs.shape
            if not same or not torch.allclose(mine, theirs, 1e-3, 1e-3 * float(mine.abs().max()), equal_nan=True):
                raise TypeError(
                    f"{what}, but its forward computes something else than their parts do in turn "
                    f"({'training' if mode else 'evaluation'} mode): {cure}"
                )


def _applied(parts: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for part in parts:
        x = part(x)
    return x


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    """float32 on the CPU: a parameter's values random and of ordinary size, a buffer's own."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        if tensor.dim() < 2:
            return torch.rand(tensor.shape) + 0.5
        return torch.randn(tensor.shape) * (tensor.numel() / tensor.shape[0]) ** -0.5
    return torch.ones(tensor.shape, dtype=dtype) if tensor.is_meta else tensor.detach().to("cpu", dtype, copy=True)


# -- saved bytes --------------------------------------------------------------------------------------------------


def _copied(module: Module, like: Callable[[torch.Tensor], torch.Tensor]) -> Module:
    """A copy of `module` with `like(t)` for each of its tensors. Tensors that are plain attributes count too: what
    weight_norm, spectral_norm and pruning make of a weight has a history, and torch copies no such tensor."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        plain = (t for t in vars(m).values() if isinstance(t, torch.Tensor))
        for t in (*m._parameters.values(), *m._buffers.values(), *plain):
            if t is not None and id(t) not in memo:
                new = like(t)
                memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    return copy.deepcopy(module, memo)


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
) -> list[nn.Sequential]:
    """Cut `model` into consecutive units; applied one after the other they are the model, with its own parameters.

    Args:
        model (nn.Module): see :func:`chain`.
        units (int or list of ints): how many, or the numbers of the parts (of :func:`chain`, from 0) at which units but
            the first begin.
        balance (str): ``"memory"``: the largest unit's saved bytes are smallest; ``"parts"``: equally many parts.
        input (Tensor): for ``"memory"``: an example batch; only its shape and dtype are used.
        overlap_blocks (int): LoCo: every unit but the last also lists the first so many parts of the next one (all,
            where it has fewer), which both units' losses train. A list of parts can then not simply be applied in
            sequence.

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
    checks.choice("balance", balance, ("memory", "parts"))
    overlap_blocks = constructors.size("overlap_blocks", overlap_blocks, 0)
    if input is not None:
        checks.tensor("input", input)
    return cut(chain(model, input), units, balance=balance, input=input, overlap_blocks=overlap_blocks)


def cut(
    parts: list[nn.Module],
    units: int | list[int] | tuple[int, ...],
    *,
    balance: str = "memory",
    input: torch.Tensor | None = None,
    overlap_blocks: int = 0,
) -> list[nn.Sequential]:
    """:func:`split_blocks` of the parts of a model."""
    if isinstance(units, (list, tuple)):
        for i, start in enumerate(units):
            checks.whole_number(f"units[{i}]", start)
        starts = [0, *units]
        if sorted(set(starts)) != starts or starts[-1] >= len(parts):
            raise ValueError(f"units must be increasing part numbers in [1, {len(parts) - 1}], got {list(units)}")
        ends = [*starts[1:], len(parts)]
    else:
        units = constructors.size("units", units)
        if units > len(parts):
            raise ValueError(f"units must be at most {len(parts)}, the parts of the model, got {units}")
        if balance == "parts":
            ends = [(i + 1) * len(parts) // units for i in range(units)]
        else:
            if input is None:
                raise ValueError('input must be an example batch for balance="memory", got None')
            ends = _balanced(to_meta(nn.ModuleList(parts)), units, input.detach().to("meta"))
    starts = [0, *ends[:-1]]
    limits = [*ends[1:], len(parts)]  # where the next unit ends
    return [nn.Sequential(*parts[a : min(b + overlap_blocks, limit)]) for a, b, limit in zip(starts, ends, limits)]
