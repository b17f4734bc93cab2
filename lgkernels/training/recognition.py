"""The indivisible parts of a model, applied one after the other: recognised by its class, its attributes or its layers.

What is recognised is proved by running the model and its parts once on the same random input.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..nn.layer_list import Path, layers_of
from . import layered, looked

Module = TypeVar("Module", bound=nn.Module)
Maker = Callable[[nn.Module], list[nn.Module]]  # a model, or a copy of it -> its parts


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


_CHANGED = " with hooks or a forward of its own, which its parts do not have"


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


def chain(model: nn.Module, input: torch.Tensor | None = None, path: Path = None) -> list[nn.Module]:
    """The indivisible parts of `model`, applied one after the other; they share the model's parameters.

    ====================================================  ============================================
    model                                                 parts
    ====================================================  ============================================
    ``nn.Sequential`` (nested ones are opened)            its children
    torchvision's and timm's ResNets                      stem, residual blocks, classifier
    torchvision's and timm's vision transformers          embedding, layers, norm and classifier
    any other, with a list of layers (transformers' BERT,  what comes before the layers, the layers (with masks,
    GPT-2, Llama, ViT; timm's ConvNeXt, Swin, Eva)        position embeddings and the like), what comes behind them
    ====================================================  ============================================

    A layer of a list that is itself such a model (a stage of ConvNeXt or Swin) is opened, unless `path` is given.

    Args:
        input (Tensor, optional): an example batch, whose shape is used; without it that of an ordinary image, or of 8
            tokens for a model of `transformers` that takes tokens.
        path (str, or several): see :func:`lgkernels.nn.layer_list.layers_of`.

    Raises: TypeError for a model of which no parts are found, or whose parts are another function than the model.
    """
    return maker(model, input, path)(model)


def maker(model: nn.Module, input: torch.Tensor | None = None, path: Path = None) -> Maker:
    """What makes the parts of the model, and of copies of it."""
    if path is None and (known := _by_class_or_attributes(model)) is not None:
        if not _is_sequence(model) and not _is_torchvisions(model):
            what = f"model ({type(model).__name__}) looks like a ResNet or vision transformer of torchvision or timm"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                duplicate = _copied(model, _randomiser(model))
                _compare(duplicate, known(duplicate), _example(model, input), what)
        return known
    names = (
        [name for name, _ in layers_of(model, path)] if path is not None or not isinstance(model, nn.Sequential) else []
    )
    if len(names) < 2:
        raise TypeError(
            "model must be an nn.Sequential, a ResNet or vision transformer of torchvision or timm, or have a list of "
            f"layers (path), got {type(model).__name__}{'' if _plain(model) else _CHANGED}: write it as an "
            "nn.Sequential of its parts"
        )
    return _by_layers(model, names, input, opens=path is None)


def _by_class_or_attributes(model: nn.Module) -> Maker | None:
    if _is_sequence(model):
        return lambda m: [leaf for child in cast(nn.Sequential, m) for leaf in _flat(child)]
    if _has(model, "conv1", "bn1", "maxpool", "layer1", "layer4", "fc"):
        return _resnet
    if _has(model, "conv_proj", "class_token", "encoder", "heads"):
        return _torchvision_vit
    return _timm_vit if _is_timm_vit(model) else None


def _by_layers(model: nn.Module, names: list[str], input: torch.Tensor | None, *, opens: bool) -> Maker:
    """Look at a run of a copy with random weights, and compare that with its parts."""
    what = f"model ({type(model).__name__}) has a list of layers, {names[0]} to {names[-1]}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        duplicate, x = _copied(model, _randomiser(model)).eval(), _example(model, input)
        layout, inputs = _looked(duplicate, names, x, what)
        if opens:
            layout = layout._replace(inside=_inside(duplicate, layout, inputs))
        _compare(duplicate, layered.parts(duplicate, layout), x, what)
    return lambda m: layered.parts(m, layout)


def _looked(model: nn.Module, names: list[str], x: torch.Tensor, what: str) -> tuple[layered.Layout, list[Any]]:
    try:
        return looked.look(model, names, x)
    except looked.Unlike as error:
        raise TypeError(f"{what}, but {error}: {CURE}") from None
    except Exception as error:
        raise TypeError(_untried(what, x, error)) from error


def _inside(model: nn.Module, layout: layered.Layout, inputs: list[Any]) -> dict[int, layered.Layout]:
    """Of layers that are stages: how their own lists are cut. One that cannot be stays whole."""
    found = {}
    for i, (name, bare) in enumerate(zip(layout.layers, layout.bare)):
        layer = model.get_submodule(name)
        names = [n for n, _ in layers_of(layer)] if bare and not isinstance(layer, nn.Sequential) else []
        sizes = [sum(p.numel() for p in m.parameters()) for m in (layer, *map(layer.get_submodule, names))]
        if len(names) < 2 or 2 * sum(sizes[1:]) < sizes[0]:
            continue
        try:
            inner, _ = _looked(layer, names, inputs[i], "a layer")
            _compare(layer, layered.parts(layer, inner), inputs[i], "a layer")
        except TypeError:
            continue
        found[i] = inner
    return found


def _is_torchvisions(model: nn.Module) -> bool:
    """An unchanged class of torchvision: its parts are known to be right, and it may be large."""
    kinds = {("torchvision.models.resnet", "ResNet"), ("torchvision.models.vision_transformer", "VisionTransformer")}
    return (type(model).__module__, type(model).__name__) in kinds and _plain(model)


def _example(model: Any, input: torch.Tensor | None) -> torch.Tensor:
    """Two random samples, of the shape of `input`, or of an image, or of tokens."""
    config = getattr(model, "config", None)
    tokens = getattr(model, "main_input_name", None) == "input_ids" if input is None else not input.is_floating_point()
    if tokens:
        length = 8 if input is None else min(input.shape[1], 8) if input.dim() > 1 else None
        shape = (2,) if length is None else (2, length, *(input.shape[2:] if input is not None else ()))
        tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
        return torch.randint(0, getattr(config, "vocab_size", None) or next(tables, 2), shape, device="cpu")
    if input is not None:
        return torch.randn(2, *input.shape[1:], dtype=torch.float32, device="cpu")
    first = getattr(model, "conv1", getattr(model, "conv_proj", getattr(model, "patch_embed", model)))
    channels = next((m.in_channels for m in first.modules() if isinstance(m, nn.Conv2d)), 3)
    size = getattr(model, "image_size", getattr(getattr(model, "patch_embed", None), "img_size", None))
    size = size or getattr(config, "image_size", 224)
    return torch.randn(
        2, channels, *(size if isinstance(size, (tuple, list)) else (size, size)), dtype=torch.float32, device="cpu"
    )


CURE = "name its list of layers by path, or write it as an nn.Sequential of its parts, in the order of its forward"


def _untried(what: str, x: torch.Tensor, error: Exception) -> str:
    return (
        f"{what}, and could not be tried on an input of shape {tuple(x.shape)} "
        f"({type(error).__name__}: {error}): give an input that fits, or {CURE}"
    )


@torch.no_grad()
def _compare(duplicate: nn.Module, parts: list[nn.Module], x: torch.Tensor, what: str) -> None:
    """Raise TypeError where the parts in turn are another function than the model.

    Both run on a copy of it with random weights (a layer that starts at 0 hides what comes before it), in evaluation
    and in training mode from the same state of the random numbers: a dropout that is left out shows in the latter. What
    the parts do not hold, a head that gives a second output in training, would be lost.
    """
    held = {id(p) for part in parts for p in part.parameters()}
    if lost := [name for name, p in duplicate.named_parameters() if id(p) not in held]:
        raise TypeError(f"{what}, but its parts do not hold {', '.join(lost[:4])}: {CURE}")
    for mode in (False, True):
        duplicate.train(mode)
        for part in parts:
            part.train(mode)
        outputs = []
        for run in (lambda x: layered.called(duplicate, x), lambda x: _applied(parts, x)):
            torch.manual_seed(1)
            try:
                outputs.append(run(x))
            except Exception as error:
                raise TypeError(_untried(what, x, error)) from error
        mine, theirs = outputs
        same = isinstance(mine, torch.Tensor) and mine.shape == theirs.shape
        if not same or not torch.allclose(mine, theirs, 1e-3, 1e-3 * float(mine.abs().max()), equal_nan=True):
            raise TypeError(
                f"{what}, but its forward computes something else than their parts do in turn "
                f"({'training' if mode else 'evaluation'} mode): {CURE}"
            )


def _applied(parts: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for part in parts:
        x = part(x)
    return x


def _randomiser(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`_random_like`; of a large model, tensors of one shape have the same memory."""
    if sum(p.numel() for p in model.parameters()) < LARGE:
        return _random_like
    made: dict[Any, torch.Tensor] = {}

    def like(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return _random_like(tensor)
        key = tensor.shape, tensor.dtype
        if key not in made:
            made[key] = _random_like(tensor)
        return made[key]

    return like


LARGE = 2**28  # parameters of which a copy is not made whole


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    """float32 on the CPU: a parameter's values random and of ordinary size, a buffer's own."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
        if tensor.dim() < 2:
            return torch.rand(tensor.shape, dtype=torch.float32, device="cpu") + 0.5
        return torch.randn(tensor.shape, dtype=torch.float32, device="cpu") * (tensor.numel() / tensor.shape[0]) ** -0.5
    return (
        torch.ones(tensor.shape, dtype=dtype, device="cpu")
        if tensor.is_meta
        else tensor.detach().to("cpu", dtype, copy=True)
    )


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
