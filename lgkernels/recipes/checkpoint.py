"""A tree of dicts, lists, numbers and tensors as one safetensors file, written at once or not at all."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

FORMAT = "lgkernels-1"


class CheckpointError(ValueError):
    """A checkpoint is missing, cut short, altered or of another kind; the message is one line for the user."""


def write_atomically(path, data):
    """Replace `path` by `data` (bytes): readers see the old file or the new one, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk's says no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _flatten(node, key, tensors):
    """JSON tree of `node`; tensors go into `tensors` under their path. Dicts keep keys that are no strings."""
    if isinstance(node, torch.Tensor):
        tensors[key] = node.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(node, dict):
        return {"dict": [[k, _flatten(v, f"{key}.{k}", tensors)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        return {type(node).__name__: [_flatten(v, f"{key}.{i}", tensors) for i, v in enumerate(node)]}
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"value": node}
    raise TypeError(
        f"a checkpoint holds dicts, lists, numbers, strings and tensors, got {type(node).__name__} at {key}"
    )


def _restore(node, tensors):
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _restore(v, tensors) for k, v in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_restore(v, tensors) for v in value)
    return value


def _digest(tree, tensors):
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def serialized(tensors, metadata):
    """A safetensors file, with equal bytes for equal contents: the library's own order of metadata is by chance."""
    from safetensors.torch import save as serialize

    data = serialize(tensors, metadata=metadata)
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[size:]


def save(path, tree):
    """Write `tree` to `path` atomically, with a digest of everything in it."""
    tensors = {}
    text = json.dumps(_flatten(tree, "state", tensors))
    metadata = {"format": FORMAT, "tree": text, "digest": _digest(text, tensors)}
    write_atomically(path, serialized(tensors, metadata))


def load(path):
    """The tree that `save` wrote. Raises CheckpointError for anything else; nothing in the file is executed."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is corrupt or cut short ({error})") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this program (format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    if _digest(metadata.get("tree", ""), tensors) != metadata.get("digest"):
        raise CheckpointError(f"checkpoint {path} is corrupt: its contents do not match their digest")
    try:
        return _restore(json.loads(metadata["tree"]), tensors)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint {path} is corrupt: its tree cannot be read") from None
