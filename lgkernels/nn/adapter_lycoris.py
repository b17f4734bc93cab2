"""Adapters by the keys of LyCORIS and Kohya's sd-scripts: `<prefix>_<name_with_underscores>.lora_down.weight`,
`.lora_up.weight`, `.alpha`, `.lokr_w1_a`, ..."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter_part import LOKR, Content, Part, check_finite, factors_of, listed, rank_of, refused

PREFIXES = {"lycoris": "lycoris", "kohya": "lora_unet"}  # what is written
_KNOWN = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lora_prior_unet")
_NAMES = {"lora_down.weight": "a", "lora_up.weight": "b", **{f"lokr_{w}": w for w in LOKR}}
_LATER = {
    "dora_scale": "weights decomposed into direction and magnitude (DoRA)",
    "lora_mid.weight": "the Tucker form",
    "lokr_t1": "the Tucker form",
    "lokr_t2": "the Tucker form",
}


def _prefix(path: Any, names: Iterable[str], prefix: str | None) -> str:
    """With its underscore."""
    if prefix is not None:
        given, prefix = prefix, prefix.rstrip("_") + "_"
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"prefix must begin names in {path!r}, got {given!r}; it has {listed(names)}")
        return prefix
    known = sorted(_KNOWN, key=len, reverse=True)
    found = {next((p for p in known if name.startswith(p + "_")), "") for name in names}
    if len(found) > 1:
        raise ValueError(
            f"prefix must be given where a file has several, got None and {listed(p or 'others' for p in found)} in "
            f"{path!r}"
        )
    if "" in found:
        raise refused(path, f"its names, {listed(names)}, have no known prefix: give prefix=")
    return found.pop() + "_"


def read(path: Any, tensors: Mapping[str, Tensor], names: Iterable[str], prefix: str | None) -> Content:
    """`names`: of the model's layers."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        at, _, factor = key.partition(".")
        layers.setdefault(at, {})[factor] = tensor
    prefix = _prefix(path, layers, prefix)
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(prefix + name.replace(".", "_"), []).append(name)
    content: dict[str, Part] = {}
    for at, found in layers.items():
        if not at.startswith(prefix):
            continue  # of another model
        for factor in found:
            if factor in _LATER:
                raise refused(path, f"{at}.{factor}: {_LATER[factor]} is not supported")
            if factor not in _NAMES and factor != "alpha":
                raise refused(path, f"{at}.{factor} is of no known adapter (LoRA, LoKr)")
            if factor in _NAMES:
                check_finite(path, f"{at}.{factor}", found[factor])
        if len(meant := by_key.get(at, [])) != 1:
            what = f"may mean {' or '.join(meant)}" if meant else "is no layer of model"
            raise refused(path, f"{at} {what}")
        content[meant[0]] = _part(path, at, found)
    return Content(content)


def _part(path: Any, at: str, found: dict[str, Tensor]) -> Part:
    kind = "lora" if any(factor.startswith("lora_") for factor in found) else "lokr"
    factors = factors_of(path, at, kind, {_NAMES[f]: t for f, t in found.items() if f != "alpha"})
    if kind == "lora" and factors["b"].dim() == 4 and factors["b"].shape[2:] == (1, 1):
        factors["b"] = factors["b"].flatten(1)
    alpha = 0.0
    if "alpha" in found:
        if found["alpha"].numel() != 1 or not torch.isfinite(found["alpha"].float()).all():
            raise refused(path, f"{at}.alpha is no number")
        alpha = found["alpha"].double().item()
    rank = rank_of(factors)
    if rank is None:  # two full matrices have no scale; theirs is the rank that they were asked for
        rank = max(1, round(alpha))
        return Part(kind, factors, rank, float(rank), 1.0)
    alpha = alpha or float(rank)  # as LyCORIS and sd-scripts have it
    return Part(kind, factors, rank, alpha, alpha / max(rank, 1))


def write(parts: Mapping[str, Part], prefix: str) -> dict[str, Tensor]:
    """The tensors of a file. A scale that the convention has no place for is multiplied into a factor."""
    theirs = {ours: name for name, ours in _NAMES.items()}
    tensors: dict[str, Tensor] = {}
    made: dict[str, str] = {}
    for name, part in parts.items():
        at = prefix.rstrip("_") + "_" + name.replace(".", "_")
        if at in made:
            raise ValueError(
                f"convention must tell layers apart, got names that are one where _ stands for a dot: {made[at]!r} and "
                f"{name!r}; use convention='peft'"
            )
        made[at] = name
        factors, rank = dict(part.factors), rank_of(part.factors)
        if rank is None and part.scale != 1:
            factors["w1"] = factors["w1"] * part.scale
        if part.kind == "lora" and factors["a"].dim() == 4:
            factors["b"] = factors["b"][:, :, None, None]
        for factor, tensor in factors.items():
            tensors[f"{at}.{theirs[factor]}"] = tensor
        tensors[f"{at}.alpha"] = torch.tensor(
            float(part.rank) if rank is None else part.scale * rank, dtype=torch.float32, device="cpu"
        )
    return tensors
