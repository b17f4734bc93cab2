"""What a file of adapters holds, whatever its convention: the factors of each layer, and how they are scaled."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.whole import gathered
from .adapter_base import Adapter
from .adapter_wrap import adapter_of

LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


class Part(NamedTuple):
    """The adapter of one layer. `factors` by our names: a, b; w1, w1_a, ..."""

    kind: str
    factors: dict[str, Tensor]
    rank: int
    alpha: float
    scale: float
    use_rslora: bool = False
    dropouts: Mapping[str, float] = {}


class Content(NamedTuple):
    """`layers` by their names in the model, `full`: tensors of the modules that learnt in full, by theirs, `base`:
    those of adapted layers, as the file's model had them. `differs(kind, layer)`: why the file's convention means
    something else than the adapter here, empty where it does not."""

    layers: dict[str, Part]
    full: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    differs: Callable[[str, nn.Module], str] = lambda kind, layer: ""


def refused(path: Any, what: str) -> ValueError:
    return ValueError(f"path must hold an adapter that fits model, got {os.fspath(path)!r}: {what}")


def listed(keys: Any) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def tensors_of(path: str) -> dict[str, Tensor]:
    """Of a safetensors file, or of torch's (tensors alone: nothing of it is executed)."""
    try:
        if path.endswith(".safetensors"):
            state = safetensors().load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # many kinds, all of them: this is no file of weights
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise refused(path, f"it cannot be read ({said})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise refused(path, "it is no dict of tensors")
    if not state:
        raise refused(path, "it is empty")
    return state


def safetensors() -> Any:
    """safetensors.torch; it is optional."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapters are in safetensors files: pip install safetensors") from None
    return safetensors.torch


def check_finite(path: Any, key: str, factor: Tensor) -> None:
    if not torch.isfinite(factor.float()).all():
        raise refused(path, f"{key} has values that are not finite")


def factors_of(path: Any, where: str, kind: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a layer, complete and of floating dtypes."""
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise refused(path, f"{name} of {where} is {str(tensor.dtype)[6:]}, not floating")
    if kind == "lora":
        whole: tuple[str, ...] = ()
        pairs: tuple[tuple[str, str], ...] = (("a", "b"),)
    else:
        whole, pairs = ("w1", "w2"), (("w1_a", "w1_b"), ("w2_a", "w2_b"))
    for pair in pairs:
        either = [name for name in whole if name == pair[0][:2]]
        expected = " or ".join([*either, " with ".join(pair)])
        there, full = [name for name in pair if name in found], any(name in found for name in either)
        if full == bool(there) or len(there) == 1:
            raise refused(path, f"{where} must have {expected}, and has {listed(found)}")
    if extra := set(found) - set(whole) - {name for pair in pairs for name in pair}:
        raise refused(path, f"{where} has {listed(extra)} beside the factors of {kind}")
    return dict(found)


def rank_of(factors: Mapping[str, Tensor]) -> int | None:
    """None: no factor says it."""
    for name in ("a", "w1_b", "w2_b"):
        if name in factors:
            return len(factors[name])
    return None


def check_fit(path: Any, name: str, layer: nn.Module, part: Part) -> None:
    """Whether the factors are those of the layer's weight."""
    if adapter_of(part.kind, layer) is None:
        raise refused(path, f"{name!r} is a {type(layer).__name__}, for which there is no {part.kind} adapter")
    weight: Any = layer.weight
    out, *rest = weight.shape if isinstance(layer, (nn.Linear, nn.Conv2d)) else weight.shape[::-1]
    shapes = {factor: tuple(t.shape) for factor, t in part.factors.items()}

    def wrong(factor: str, expected: Any) -> ValueError:
        return refused(path, f"{factor} of {name!r} has shape {shapes[factor]}, expected {expected}")

    if any(0 in shape or not shape for shape in shapes.values()):
        raise refused(path, f"a factor of {name!r} is empty")
    if part.kind == "lora":
        rank = shapes["a"][0]
        if shapes["a"] != (rank, *rest):
            raise wrong("a", ("rank", *rest))
        if shapes["b"] != (out, rank):
            raise wrong("b", (out, rank))
        return
    window = tuple(rest[1:])
    sides = []
    for w, inner in (("w1", ()), ("w2", window)):
        if w in shapes:
            if len(shapes[w]) != 2 + len(inner) or shapes[w][2:] != inner:
                raise wrong(w, ("out", "in", *inner))
            sides.append(shapes[w][:2])
            continue
        a, b = shapes[f"{w}_a"], shapes[f"{w}_b"]
        if len(a) != 2:
            raise wrong(f"{w}_a", ("out", "rank"))
        area = torch.Size(inner).numel()
        if len(b) != 2 or b[0] != a[1] or b[1] % area:
            raise wrong(f"{w}_b", (a[1], f"in * {area}" if inner else "in"))
        sides.append((a[0], b[1] // area))
    product = sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]
    if product != (out, rest[0]):
        raise refused(path, f"w1 and w2 of {name!r} give a {product} Kronecker product, expected {(out, rest[0])}")


def adapter_from(part: Part, layer: nn.Module, autocast_adapter_dtype: bool) -> Adapter:
    """A new adapter around a layer; `check_fit` has been."""
    options = dict(part.dropouts, use_rslora=part.use_rslora, autocast_adapter_dtype=autocast_adapter_dtype)
    adapter = adapter_of(part.kind, layer)(layer, part.rank, part.alpha, **options)
    like = adapter.factor
    for name in list(adapter._parameters):
        delattr(adapter, name)
    for name, tensor in part.factors.items():
        setattr(adapter, name, nn.Parameter(tensor.to(like.device, like.dtype, copy=True).contiguous()))
    adapter.scale = part.scale
    return adapter


def part_from(adapter: Any) -> Part:
    """Of an adapter in a model."""
    kind = "lora" if "a" in adapter._parameters else "lokr"
    factors = {name: gathered(p.detach()).cpu() for name, p in adapter._parameters.items()}
    dropouts = {
        name: getattr(adapter, name) for name in ("dropout", "rank_dropout", "module_dropout") if hasattr(adapter, name)
    }
    return Part(kind, factors, adapter.rank, adapter.alpha, adapter.scale, adapter.use_rslora, dropouts)
