"""Adapters by PEFT's keys: adapter_config.json, and adapter_model.safetensors with
`base_model.model.<name>.lora_A.weight`, `.lora_B.weight`, `.lokr_w1`, ..."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .adapter_base import is_conv1d
from .adapter_lokr import factorization
from .adapter_part import LOKR, Content, Part, check_finite, factors_of, listed, rank_of, refused

PREFIX = "base_model.model."
_NAMES = {"lora_A.weight": "a", "lora_B.weight": "b", **{f"lokr_{w}": w for w in LOKR}}
_KEY = re.compile(rf"(.*)\.({'|'.join(map(re.escape, _NAMES))})")
_BASE = re.compile(r"(.*)\.base_layer\.(\w+)")  # PEFT adds that of an adapted lm_head or embedding
_HARMLESS = {  # what does not change how the factors of a file are applied
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "inference_mode",
    ),
    *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "rank_dropout"),
    *("module_dropout", "rank_dropout_scale", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "init_weights", "decompose_both"),
    *("decompose_factor", "use_effective_conv2d", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
}
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def _dict(path: Any, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise refused(path, f"adapter_config.json has {name}={value!r}, expected an object")
    return value


def _number(path: Any, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refused(path, f"adapter_config.json has {name}={value!r}, expected a number")
    return value


def _of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """As PEFT looks it up: the first key that is the name or an end of it, as a regular expression."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error:
            continue
    return default


def _kind(path: Any, config: Mapping[str, Any]) -> str:
    kind = {"LORA": "lora", "LOKR": "lokr"}.get(str(config.get("peft_type")))
    if kind is None:
        raise refused(path, f"adapter_config.json has peft_type={config.get('peft_type')!r}, expected LORA or LOKR")
    for name, value in config.items():
        if name not in _HARMLESS and value not in (None, False, "none", [], {}):
            raise refused(path, f"adapter_config.json has {name}={value!r}, which is not supported")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_CHANGE_THE_BASE):
        raise refused(
            path,
            f"init_lora_weights={start!r} changed the weights of its model; save it with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    return kind


def _dropouts(kind: str, config: Mapping[str, Any]) -> dict[str, float]:
    if kind == "lora":
        return {"dropout": config.get("lora_dropout") or 0.0}
    return {name: config.get(name) or 0.0 for name in ("rank_dropout", "module_dropout")}


def read(path: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, prefix: str | None) -> Content:
    """`config` None: a file of diffusers, whose alpha is the rank."""
    prefix = PREFIX if prefix is None else prefix.rstrip(".") + "." if prefix else ""
    mine = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    if not mine:
        raise ValueError(f"prefix must begin keys in {path!r}, got {prefix!r}; it has {listed(tensors)}")
    if prefix == PREFIX and len(mine) < len(tensors):
        raise refused(path, f"{listed(key for key in tensors if not key.startswith(prefix))}: not {prefix}...")
    kind = None if config is None else _kind(path, config)
    config = config or {}
    saved = config.get("modules_to_save") or []
    layers: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in mine.items():
        if match := _KEY.fullmatch(key):
            check_finite(path, prefix + key, tensor)
            layers.setdefault(match[1], {})[_NAMES[match[2]]] = tensor
        elif match := _BASE.fullmatch(key):
            base[f"{match[1]}.{match[2]}"] = tensor
        elif any(re.match(rf"(^|.*\.){re.escape(str(m))}\.", key) for m in saved):
            full[key] = tensor
        else:
            raise refused(path, f"{prefix}{key} is of no known adapter (LoRA, LoKr), nor of modules_to_save")
    if kind is None:
        kind = "lora"
    parts = {name: _part(path, name, kind, found, config) for name, found in layers.items()}
    return Content(parts, full, base, differs)


def _part(path: Any, name: str, kind: str, found: dict[str, Tensor], config: Mapping[str, Any]) -> Part:
    factors = factors_of(path, name, kind, found)
    if kind == "lora" and factors["b"].dim() == 4 and factors["b"].shape[2:] == (1, 1):
        factors["b"] = factors["b"].flatten(1)
    held = rank_of(factors)
    rank = _of_pattern(_dict(path, config, "rank_pattern"), name, config.get("r", held))
    rank = _number(path, "r", rank)
    if rank != int(rank) or rank < 1 or held not in (None, rank):
        raise refused(path, f"adapter_config.json has r={rank} for {name!r}, whose factors are of rank {held}")
    alpha = config.get("lora_alpha" if kind == "lora" else "alpha", rank)
    alpha = _number(path, "alpha", _of_pattern(_dict(path, config, "alpha_pattern"), name, alpha))
    use_rslora = bool(config.get("use_rslora")) and kind == "lora"
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    dropouts = {key: _number(path, key, value) for key, value in _dropouts(kind, config).items()}
    return Part(kind, factors, int(rank), float(alpha), scale, use_rslora, dropouts)


# -- writing ---------------------------------------------------------------------------------------------------------


def write(
    parts: Mapping[str, Part], full: Mapping[str, Tensor], modules: Mapping[str, nn.Module], saved: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors). `modules`: the model's, by name, `saved`: those that learnt in full."""
    saved, kinds = list(saved), {part.kind for part in parts.values()}
    if len(kinds) > 1:
        raise ValueError("convention must hold what the adapter is, got LoRA and LoKr under one name; use 'lycoris'")
    for name in parts:
        if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in saved):
            raise ValueError(
                f"convention must tell layers apart, got {name!r}, which PEFT would take for one of those that learn "
                f"in full, {listed(saved)}; save its factors and those modules apart"
            )
    kind = kinds.pop()
    config = _lora_config(parts, modules) if kind == "lora" else _lokr_config(parts, modules)
    ends = tuple(f".{name}" for name in parts)
    every = [name for name in modules if name in parts or name.endswith(ends)]
    target: Any = sorted(parts)
    if len(every) > len(parts):  # names that are ends of others: a regular expression says which
        target = f"^({'|'.join(map(re.escape, target))})$"
    config = {
        **config,
        "base_model_name_or_path": getattr(getattr(modules[""], "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": saved or None,
        "target_modules": target,
        "task_type": None,
    }
    theirs = {ours: name for name, ours in _NAMES.items()}
    tensors = dict(full)
    for name, part in parts.items():
        for factor, tensor in part.factors.items():
            if factor == "b" and part.factors["a"].dim() == 4:
                tensor = tensor[:, :, None, None]
            tensors[f"{name}.{theirs[factor]}"] = tensor
    return config, {PREFIX + key: tensor for key, tensor in tensors.items()}


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _with_patterns(config: dict[str, Any], of: str, values: Mapping[str, float]) -> None:
    """`config[of]`, and by name, the longest first, where the layers differ."""
    several = len(set(values.values())) > 1
    config[of] = _plain(next(iter(values.values())))
    pattern = {re.escape(n): _plain(values[n]) for n in sorted(values, key=len, reverse=True)} if several else {}
    config["rank_pattern" if of == "r" else "alpha_pattern"] = pattern


def differs(kind: str, layer: nn.Module) -> str:
    """Why PEFT's LoRA of a convolution computes something else than ours, empty where it does not."""
    if kind != "lora" or not isinstance(layer, nn.Conv2d):
        return ""
    if layer.groups > 1:
        return "a convolution with groups: PEFT's LoRA of it is no change of its weight"
    if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
        return f"a convolution with padding_mode={layer.padding_mode!r}: PEFT's LoRA of it pads with zeros"
    if any(d > 1 and k > 1 for d, k in zip(layer.dilation, layer.kernel_size)):
        return f"a convolution with dilation={layer.dilation}: PEFT's LoRA of it is not dilated"
    return ""


def _lora_config(parts: Mapping[str, Part], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    for name in parts:
        if why := differs("lora", modules[name]):
            raise ValueError(f"convention must know what the adapter is, got {name!r}, {why}; use convention='lycoris'")
    first = next(iter(parts.values()))
    use_rslora = all(part.use_rslora for part in parts.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": any(type(modules[name]).__name__ == "Conv1D" for name in parts),
        "init_lora_weights": True,
        "lora_dropout": first.dropouts.get("dropout", 0.0),
        "use_dora": False,
        "use_rslora": use_rslora,
    }
    root = math.sqrt if use_rslora else float
    _with_patterns(config, "r", {name: part.rank for name, part in parts.items()})
    alphas = {n: p.alpha if p.use_rslora == use_rslora else p.scale * root(p.rank) for n, p in parts.items()}
    _with_patterns(config, "lora_alpha", alphas)
    return config


def _split(size: int, factor: int) -> tuple[int, int]:
    """As PEFT's factorization, which unlike LyCORIS' leaves the smaller part where the factor's is the larger."""
    return (factor, size // factor) if factor > 0 and size % factor == 0 else factorization(size, factor)


def _structure(sizes: tuple[int, int], rank: int, factor: int, both: bool) -> tuple[bool, bool, tuple[int, ...]]:
    """Whether PEFT makes w1 and w2 in full, and (out1, out2, in1, in2)."""
    (out1, out2), (in1, in2) = (_split(size, factor) for size in sizes)
    return not both or rank >= max(out1, in1) / 2, rank >= max(out2, in2) / 2, (out1, out2, in1, in2)


def _lokr_config(parts: Mapping[str, Part], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    wanted = {}
    for name, part in parts.items():
        if is_conv1d(modules[name]):
            raise ValueError(
                f"convention must know what the adapter is, got {name!r}, a Conv1D of transformers: PEFT has no LoKr "
                "of it; use convention='lycoris'"
            )
        weight: Any = modules[name].weight
        out, width = weight.shape[:2] if isinstance(modules[name], (nn.Linear, nn.Conv2d)) else weight.shape[::-1]
        f = part.factors
        out1, in1 = f["w1"].shape if "w1" in f else (len(f["w1_a"]), f["w1_b"].shape[1])
        sides = out1, out // out1, in1, width // in1
        wanted[name] = (out, width), ("w1" in f, "w2" in f, sides)
    largest = max(side for _, (_, _, sides) in wanted.values() for side in sides)
    for both in (False, True):
        for factor in (-1, *range(1, largest + 1)):
            ranks: dict[str, int] = {}
            for name in parts:
                rank = _rank(parts[name], *wanted[name], factor, both)
                if rank is None:
                    break
                ranks[name] = rank
            else:
                return _lokr_written(parts, ranks, factor, both)
    raise ValueError(
        "convention must know what the adapter is, got Kronecker factors that no decompose_factor of PEFT makes in all "
        f"of {listed(parts)}; use convention='lycoris'"
    )


def _rank(part: Part, sizes: Any, structure: Any, factor: int, both: bool) -> int | None:
    """One with which PEFT makes the factors as they are."""
    least = math.ceil(max(structure[2]) / 2)  # makes both full, whatever the rank was
    ranks = (part.rank, least) if rank_of(part.factors) is None else (part.rank,)
    return next((r for r in ranks if _structure(sizes, r, factor, both) == structure), None)


def _lokr_written(parts: Mapping[str, Part], ranks: Mapping[str, Any], factor: int, both: bool) -> dict[str, Any]:
    first = next(iter(parts.values()))
    config: dict[str, Any] = {
        "peft_type": "LOKR",
        "decompose_both": both,
        "decompose_factor": factor,
        "init_weights": True,
        "module_dropout": first.dropouts.get("module_dropout", 0.0),
        "rank_dropout": first.dropouts.get("rank_dropout", 0.0),
        "rank_dropout_scale": False,
        "use_effective_conv2d": False,
    }
    _with_patterns(config, "r", ranks)
    _with_patterns(config, "alpha", {name: part.scale * ranks[name] for name, part in parts.items()})
    return config
