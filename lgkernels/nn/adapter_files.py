"""Adapters in files, by the key names of PEFT, LyCORIS and Kohya's sd-scripts."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import checks, constructors, names
from ..core.whole import gathered, require_unsharded
from . import adapter_lycoris, adapter_peft
from . import adapter_wrap as wrap
from .adapter_base import DEFAULT
from .adapter_part import Content, adapter_from, check_fit, listed, part_from, refused, safetensors, tensors_of

Convention = Literal["peft", "lycoris", "kohya"]
_CONVENTIONS = ("peft", "lycoris", "kohya")
_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def _path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise TypeError(f"path must be a str or a pathlib.Path, got {type(path).__name__}")
    return text


def _checked(convention: Any, prefix: Any) -> None:
    if convention is not None:
        checks.choice("convention", convention, _CONVENTIONS)
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix must be a str or None, got {type(prefix).__name__}")


def _config(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(path, f"it cannot be read ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise refused(path, "it is no object")
    return config


def _read(path: str, convention: str | None, prefix: str | None, layers: list[str]) -> Content:
    if os.path.isdir(path):
        if convention in ("lycoris", "kohya"):
            raise refused(path, f"it is a folder, and convention={convention!r} has one file")
        there = [name for name in _WEIGHTS if os.path.isfile(os.path.join(path, name))]
        if not there:
            raise refused(path, f"it has neither {' nor '.join(_WEIGHTS)}")
        config = _config(os.path.join(path, _CONFIG))
        return adapter_peft.read(path, tensors_of(os.path.join(path, there[0])), config, prefix)
    if not os.path.isfile(path):
        raise ValueError(f"path must be a file or PEFT's folder, got {path!r}, which does not exist")
    tensors = tensors_of(path)
    if convention is None:
        convention = "peft" if any(".lora_A." in k or k.startswith(adapter_peft.PREFIX) for k in tensors) else "lycoris"
    if convention != "peft":
        return adapter_lycoris.read(path, tensors, layers, prefix)
    beside = os.path.join(os.path.dirname(path), _CONFIG)
    needed = os.path.basename(path) in _WEIGHTS or os.path.isfile(beside)
    return adapter_peft.read(path, tensors, _config(beside) if needed else None, prefix)


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    convention: Convention | None = None,
    prefix: str | None = None,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    r"""Put the LoRA or LoKr adapter of a file around the layers of `model` that it names, and freeze the rest.

    Args:
        model (nn.Module): changed in place; it may have adapters of other names. The new one alone is active.
        path (str or Path): PEFT's folder (``adapter_config.json`` and ``adapter_model.safetensors``), or one file, of
            LyCORIS, of Kohya's sd-scripts, or of diffusers (PEFT's keys; alpha is the rank).
        adapter_name (str): what it is called in the model.
        convention (str, optional): ``"peft"``, ``"lycoris"`` or ``"kohya"``. None: what the keys look like.
        prefix (str, optional): what the names of the layers begin with in the file, ``"lora_unet"``, ``"transformer"``.
            Keys with another one are left to other models. None: any of the usual ones; the file must have one alone.
        is_trainable (bool): the adapter, and what the file has in full, goes on learning.
        autocast_adapter_dtype (bool): factors are float32 beside a half-precision weight, whatever the file has.

    PEFT scales by alpha / r, or alpha / :math:`\sqrt r` where the file says so, LyCORIS and sd-scripts by alpha / rank,
    two full Kronecker factors by 1. Modules that PEFT saved in full (``modules_to_save``) are copied into the model.
    Whatever is not understood is an error: DoRA, the Tucker form, biases, keys that name no layer, other shapes; also
    PEFT's LoRA of convolutions with groups, dilation or a padding other than zeros, which is no change of a weight.
    Nothing in a file is executed.

    Returns:
        the model. Raises: TypeError, ValueError naming the argument, before the model changes.

    Example:
        >>> import tempfile, torch, lgkernels.nn as lnn
        >>> model = lnn.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), "lora", rank=2, verbose=False)
        >>> other = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lnn.save_adapter(model, folder)
        ...     lnn.load_adapter(other, folder)[0]
        LoRALinear(
          rank=2, alpha=4.0, scale=2
          (base): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    constructors.module("model", model)
    text = _path(path)
    _checked(convention, prefix)
    require_unsharded(model, "given its adapter", "load_adapter first")
    constructors.flags(is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype)
    wrap.check_new_name(model, adapter_name)
    modules = wrap.layers(model)
    could = [name for name, module in modules.items() if name and wrap.adapter_of("lora", module)]
    content = _read(text, convention, prefix, could)
    places: dict[nn.Module, list[str]] = {}
    for name in could:
        places.setdefault(modules[name], []).append(name)
    chosen = {}
    for name, part in content.layers.items():
        if name not in modules or not name:
            near = names.near(name, could)
            raise refused(text, f"{name!r} is no layer of model" + (near and f"; {near}"))
        layer = wrap.layer_of(modules[name])
        check_fit(text, name, layer, part)
        if why := content.differs(part.kind, layer):
            raise refused(text, f"{name!r} is {why}")
        if modules[name] in chosen:
            raise refused(
                text, f"{' and '.join(places[modules[name]])} are one layer of model, and have an adapter each"
            )
        chosen[modules[name]] = part
    full = _full(text, model, content.full)
    _check_base(text, modules, content.base)
    full_modules = tuple(dict.fromkeys(key.rpartition(".")[0] for key in content.full))
    if not chosen:
        raise refused(text, "it has no factors")
    parts = {wrap.layer_of(module): part for module, part in chosen.items()}
    new = [(module, places[module]) for module in chosen]
    adapters = wrap.make(model, new, lambda layer, name: adapter_from(parts[layer], layer, autocast_adapter_dtype))
    wrap.put(model, adapters, adapter_name, full_modules, is_trainable)
    with torch.no_grad():
        for mine, theirs in full:
            mine.copy_(theirs)
    return model


def _check_base(path: str, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> None:
    """Weights of adapted layers, which PEFT adds for a head: they are to be the model's."""
    for key, theirs in tensors.items():
        name, _, parameter = key.rpartition(".")
        layer = wrap.layer_of(modules[name]) if name in modules else None
        mine = getattr(layer, parameter, None)
        if not isinstance(mine, Tensor):
            raise refused(path, f"{name}.base_layer.{parameter} is of no parameter of model")
        mine, theirs = mine.detach().cpu(), theirs.cpu()
        equal = mine.shape == theirs.shape and (
            torch.equal(mine.to(theirs.dtype), theirs) or torch.equal(mine, theirs.to(mine.dtype))
        )
        if not equal:
            raise refused(
                path, f"{name}.base_layer.{parameter} is not {key} of model: load the weights of the file's model first"
            )


def _full(path: str, model: nn.Module, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(the model's, the file's) of the modules that learnt in full."""
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    pairs = []
    for key, theirs in tensors.items():
        if key not in state:
            raise refused(path, f"{key!r} is no parameter of model")
        if state[key].shape != theirs.shape:
            raise refused(path, f"{key} has shape {tuple(theirs.shape)}, expected {tuple(state[key].shape)}")
        pairs.append((state[key], theirs))
    return pairs


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    convention: Convention = "peft",
    prefix: str | None = None,
) -> None:
    """Save an adapter of `model` so that PEFT, LyCORIS or Kohya's sd-scripts load it (:func:`load_adapter` does, too).

    Args:
        model (nn.Module): with adapters.
        path (str or Path): with PEFT's convention a folder, which is made; else a ``.safetensors`` file.
        adapter_name (str, optional): which one. None: the only one.
        convention (str): ``"peft"``, ``"lycoris"`` (``lycoris_<name>...``) or ``"kohya"`` (``lora_unet_<name>...``).
        prefix (str, optional): of names by the last two, instead of those.

    With PEFT's convention the modules that the adapter trains in full (``train_head``, ``train_norm``), learning or
    frozen by now, are saved with it, as ``modules_to_save``; the others have no place for them, which is an error.
    Factors keep their dtype.

    Raises: TypeError, ValueError naming the argument, before anything is written.

    Example: see :func:`load_adapter`.
    """
    constructors.module("model", model)
    text = _path(path)
    checks.choice("convention", convention, _CONVENTIONS)
    _checked(convention, prefix)
    if prefix is not None and not re.fullmatch(r"\w+", prefix):
        raise ValueError(f"prefix must be of letters, digits and _, got {prefix!r}")
    known = wrap.adapter_names(model)
    if adapter_name is None and len(known) == 1:
        adapter_name = known[0]
    if adapter_name is not None:
        wrap.check_name(adapter_name)
    if adapter_name not in known:
        raise ValueError(
            f"adapter_name must be of {', '.join(known) or 'an adapter of model, which has none'}, got {adapter_name!r}"
        )
    adapters = {name: first.named_adapters() for name, first in wrap.adapted(model).items()}
    parts = {name: part_from(all_[adapter_name]) for name, all_ in adapters.items() if adapter_name in all_}
    in_full = wrap.in_full(model, adapter_name)
    saved = [name for name in wrap.layers(model) if name in in_full]
    if convention == "peft":
        if prefix is not None:
            raise ValueError(f"prefix must be None with convention='peft', got {prefix!r}")
        for at in saved:
            if getattr(wrap.layers(model)[at], "merged", False):
                raise ValueError(f"model must not be merged, got {at!r} merged: unmerge(model) first")
        modules = {name: wrap.layer_of(module) for name, module in wrap.layers(model).items()}
        full = {f"{at}.{k}": gathered(v).cpu() for at in saved for k, v in modules[at].state_dict().items()}
        config, tensors = adapter_peft.write(parts, full, modules, saved)
        if os.path.exists(text) and not os.path.isdir(text):
            raise ValueError(f"path must be a folder with convention='peft', got {text!r}, which is a file")
        os.makedirs(text, exist_ok=True)
        _write_tensors(tensors, os.path.join(text, _WEIGHTS[0]))
        _replaced(os.path.join(text, _CONFIG), lambda at: Path(at).write_text(json.dumps(config, indent=2) + "\n"))
        return
    if saved:
        raise ValueError(
            f"convention must have a place for modules that learn in full, got {convention!r} and {listed(saved)}; use "
            "'peft'"
        )
    if not text.endswith(".safetensors") or os.path.isdir(text):
        raise ValueError(f"path must be a .safetensors file with convention={convention!r}, got {text!r}")
    if not os.path.isdir(os.path.dirname(text) or "."):
        raise ValueError(f"path must be a file in a folder that exists, got {text!r}; make its folder first")
    _write_tensors(adapter_lycoris.write(parts, prefix or adapter_lycoris.PREFIXES[convention]), text)


def _write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    own = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # none shares memory with another
    _replaced(path, lambda at: safetensors().save_file(own, at, {"format": "pt"}))


def _replaced(path: str, write: Any) -> None:
    """A file that is whole, or as it was."""
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
