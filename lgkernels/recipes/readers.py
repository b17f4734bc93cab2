"""Readers of the files that data sets come in. Every one returns tensors: images uint8 (N, C, H, W), labels int64."""

import collections
import concurrent.futures
import gzip
import io
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".pgm", ".tga")
# what systems, archives and network drives leave beside the data
_JUNK = {"__MACOSX", "@eaDir", "@__thumb", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"}
_JUNK |= {"lost+found", "__pycache__", "Thumbs.db"}


class DataError(ValueError):
    """A data file is missing or is not what it should be; the message is one line for the user."""


def pillow():
    """PIL.Image, needed for image folders and JPEG alone."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("this data set needs Pillow to decode its images: pip install pillow") from None
    return Image


def is_data(path, folder):
    """Whether a path under `folder` is data: no hidden file or folder (`._x.jpg`), nothing that a system put there."""
    return not any(part.startswith(".") or part in _JUNK for part in path.relative_to(folder).parts)


# the sets that a folder's name can tell apart, the first match counts
_NAMED = {
    "fashion-mnist": "fashion",
    "KMNIST, EMNIST or the like": "[a-z]mnist|kuzushiji",
    "mnist": "mnist",
    "tiny-imagenet": "tiny.?imagenet|imagenet.?tiny",
    "imagenette": "imagenette",
    "vww": "vww|visual.?wake",
    "cifar10-jpeg": "cifar.?10(?![0-9])",
    "cifar100": "cifar.?100",
    "ImageNet or Imagewoof": "imagenet|imagewoof",
}


def _named(path, folder):
    """The set that the innermost folder with such a name, under `folder`, is named for; None: no name says."""
    for part in reversed(path.relative_to(folder).parts):
        for name, words in _NAMED.items():
            if re.search(words, part.lower()):
                return name
    return None


def _complete(folder, pieces):
    return all(any((folder / name).exists() for name in piece) for piece in pieces)


def home(folder, wanted, pieces, kind=Path.is_file):
    """The one folder that all of a set's pieces are read from: `folder` itself, or one up to two deeper.

    Args:
        wanted: the set's name. Of several folders that one is taken whose name says it (torchvision's MNIST/raw
            beside FashionMNIST/raw), else the one that no name speaks against; None: names say nothing.
        pieces: for each piece the names that it may have. kind: what the deeper ones must be.

    Raises DataError where two folders match, or those alone that are named for another set. A folder that lacks
    pieces is returned where none is complete: the reader says what is missing.
    """
    folder = Path(folder)
    if _complete(folder, pieces):
        return folder
    names = [name for piece in pieces for name in piece]
    hits = (hit for name in names for depth in ("*", "*/*") for hit in folder.glob(f"{depth}/{name}"))
    homes = sorted({hit.parent for hit in hits if is_data(hit, folder) and kind(hit)})
    called = {path: _named(path, folder) if wanted else None for path in homes}
    own = [path for path in homes if called[path] == wanted] or [path for path in homes if called[path] is None]
    if homes and not own:
        raise DataError(
            f"no {wanted} in {folder}: {homes[0]} is named for {called[homes[0]]}; if it is meant, "
            "give that folder itself"
        )
    whole = [path for path in own if _complete(path, pieces)]
    whole = [path for path in whole if not any(other in path.parents for other in whole)]
    if len(whole) > 1:
        raise DataError(f"{' and '.join(map(str, whole))} both match {wanted or 'an image folder'}: give one of them")
    return next(iter(whole or own), folder)


def piece(folder, names):
    """The path of the first of `names` in `folder`, files before folders."""
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise DataError(f"no {' or '.join(names)} in {folder}")
    return next((path for path in found if path.is_file()), found[0])


def read_idx(path):
    """IDX file of bytes (MNIST's format), also gzipped -> uint8 array."""
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        zero, kind, rank = struct.unpack(">HBB", raw[:4])
        if zero or kind != 8 or rank > 8:
            raise DataError(f"{path} is not an IDX file of bytes (it starts with {raw[:4].hex()})")
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is not a complete IDX file ({error})") from None
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if body.size != math.prod(shape):
        raise DataError(f"{path} is cut short: {math.prod(shape)} bytes expected for shape {shape}, got {body.size}")
    return body.reshape(shape)


_IDX = {
    prefix: [
        [f"{prefix}-{part}{dot}{rank}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
        for part, rank in (("images", "idx3"), ("labels", "idx1"))
    ]
    for prefix in ("train", "t10k")
}


def mnist(folder, wanted):
    """Four IDX files of one folder, as distributed: (train images, labels), (test images, labels)."""
    folder = home(folder, wanted, [names for pieces in _IDX.values() for names in pieces])
    splits = []
    for prefix, pieces in _IDX.items():
        arrays = [read_idx(piece(folder, names)) for names in pieces]
        if [a.ndim for a in arrays] != [3, 1] or arrays[0].shape[1:] != (28, 28):
            raise DataError(
                f"{prefix} in {folder} must hold images (N, 28, 28) and labels (N,), got shapes "
                f"{arrays[0].shape} and {arrays[1].shape}"
            )
        splits.append((torch.from_numpy(arrays[0].copy()).unsqueeze(1), torch.from_numpy(arrays[1].astype(np.int64))))
    return splits


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, bytes and NumPy's arrays and numbers; anything else in the file is refused, never
    called. NumPy's parts have had two homes."""

    _ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    _ALLOWED |= {("builtins", "bytearray"), ("__builtin__", "bytearray")}  # its name in protocol 2
    _ALLOWED |= {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    }

    def find_class(self, module, name):
        if (module, name) in self._ALLOWED:
            core = "numpy._core" if hasattr(np, "_core") else "numpy.core"
            return super().find_class(module.replace("numpy._core", "numpy.core").replace("numpy.core", core), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def _cifar_pickle(path, label_key):
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(batch["data"]), np.asarray(batch[label_key]).reshape(-1)
        if (
            labels.dtype.kind not in "iu"
            or images.dtype.kind not in "iu"
            or images.size
            and (images.min() < 0 or images.max() > 255)
        ):
            raise ValueError(
                f"it holds images as {images.dtype} and labels as {labels.dtype}, expected bytes and integers"
            )
        if images.size != len(labels) * 3072:
            raise ValueError(f"it holds {len(labels)} labels and images of shape {images.shape}")
        return images.astype(np.uint8).reshape(-1, 3, 32, 32), labels.astype(np.int64)
    except Exception as error:  # a damaged pickle raises anything
        said = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is not a CIFAR batch ({said})") from None


def _cifar_binary(path, label_bytes):
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % (label_bytes + 3072):
        raise DataError(f"{path} is not a CIFAR batch: {raw.size} bytes are no multiple of {label_bytes + 3072}")
    rows = raw.reshape(-1, label_bytes + 3072)
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].astype(np.int64)


def cifar(folder, classes):
    """CIFAR-10 or -100 from the python (torchvision) or the binary folder, or a folder that holds one of them."""
    if classes == 10:
        forms = {
            "python": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
            "binary": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
        }
        label_key, label_bytes = "labels", 1
    else:
        forms = {
            "python": ("cifar-100-python", ["train"], ["test"]),
            "binary": ("cifar-100-binary", ["train.bin"], ["test.bin"]),
        }
        label_key, label_bytes = "fine_labels", 2
    for form, (name, train, test) in forms.items():
        for base in (Path(folder) / name, Path(folder)):
            if all((base / file).is_file() for file in train + test):
                read = (
                    (lambda p: _cifar_pickle(p, label_key))
                    if form == "python"
                    else (lambda p: _cifar_binary(p, label_bytes))
                )
                parts = [[read(base / file) for file in files] for files in (train, test)]
                return [tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*part)) for part in parts]
    wanted = " or ".join(name for name, _, _ in forms.values())
    raise DataError(f"no complete {wanted} in {folder}")


def _decoded(image, source, name):
    """The picture as 8-bit RGB. Decoders raise anything for a damaged file (PNG's a SyntaxError), and refuse bombs."""
    try:
        with image.open(source) as picture:
            if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                grey = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
                return image.fromarray(grey.astype(np.uint8)).convert("RGB")
            return picture.convert("RGB")
    except Exception as error:
        raise DataError(f"{name} cannot be decoded ({error})") from None


def cifar10_jpeg(folder):
    """The JPEG copy of CIFAR-10: cifar10_train.npz and cifar10_test.npz, all images under one JPEG header."""
    image = pillow()
    files = [["cifar10_train.npz"], ["cifar10_test.npz"]]
    folder = home(folder, "cifar10-jpeg", files)
    splits = []
    for names in files:
        path = piece(folder, names)
        try:
            with np.load(path, allow_pickle=False) as file:
                header, body = file["header"].tobytes(), file["bytes"].tobytes()
                offsets, labels = file["offsets"].tolist(), file["labels"].astype(np.int64)
        except (OSError, KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is not a copy of CIFAR-10 as JPEGs ({error})") from None
        if labels.ndim != 1 or len(offsets) != len(labels) + 1:
            raise DataError(
                f"{path} must hold one offset more than labels, got {len(offsets)} and labels of shape {labels.shape}"
            )
        if offsets[0] != 0 or offsets[-1] != len(body) or any(a >= b for a, b in zip(offsets, offsets[1:])):
            raise DataError(f"{path} must hold offsets that rise from 0 to its {len(body)} bytes")
        pixels = np.empty((len(labels), 3, 32, 32), np.uint8)
        for i, (start, end) in enumerate(zip(offsets, offsets[1:])):
            picture = _decoded(image, io.BytesIO(header + body[start:end]), f"image {i} of {path}")
            if picture.size != (32, 32):
                raise DataError(f"image {i} of {path} is {picture.size[0]} x {picture.size[1]}, expected 32 x 32")
            pixels[i] = np.asarray(picture).transpose(2, 0, 1)
        splits.append((torch.from_numpy(pixels), torch.from_numpy(labels)))
    return splits


class FolderImages:
    """Images on disk, decoded when asked for: shorter side resized to `resize`, then its centre square."""

    def __init__(self, paths, resize):
        self.paths, self.resize = paths, resize
        self.image = pillow()
        self.workers = concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, indices):
        paths = [self.paths[i] for i in indices.tolist()]
        return torch.stack(list(self.workers.map(self._decode, paths)))

    def _decode(self, path):
        picture = _decoded(self.image, path, path)
        width, height = picture.size
        if max(width, height) > 32 * min(width, height):  # its shorter side resized, a thread of pixels fills memory
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
            width = height = side
        if min(width, height) != self.resize:
            scale = self.resize / min(width, height)
            picture = picture.resize(
                (max(self.resize, round(width * scale)), max(self.resize, round(height * scale))), self.image.BILINEAR
            )
        left, top = (picture.size[0] - self.resize) // 2, (picture.size[1] - self.resize) // 2
        square = picture.crop((left, top, left + self.resize, top + self.resize))
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)


def _images(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and is_data(p, folder) and p.is_file())


def _warn_of_other_images(*folders):
    """Once for a data set: images in formats that are not read."""
    found = collections.Counter(
        p.suffix.lower()
        for folder in folders
        for p in folder.rglob("*")
        if p.suffix.lower() in _OTHER_SUFFIXES and is_data(p, folder) and p.is_file()
    )
    if found:
        said = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(found.items()))
        warnings.warn(
            f"images under {folders[0].parent} are left out, {said}: those of {', '.join(_SUFFIXES)} are read",
            stacklevel=4,
        )


def _classes(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and is_data(p, folder))


def image_folder(folder, resize, wanted):
    """train/<class>/... and val/<class>/..., classes in alphabetical order; Tiny ImageNet's annotated val/ too.

    `folder` may also hold one folder with these two (imagenette2-160, tiny-imagenet-200), which `wanted` names where
    it holds several; None: any.
    """
    train = piece(home(folder, wanted, [["train"], ["val", "test"]], Path.is_dir), ["train"])
    val = next((train.parent / name for name in ("val", "test") if (train.parent / name).is_dir()), None)
    if val is None:
        raise DataError(f"no val or test beside {train}")
    classes = [p.name for p in _classes(train)]
    if not classes:
        raise DataError(f"{train} must hold one folder a class, got none")
    if len(classes) == 1:
        warnings.warn(f"{train} holds one class alone, {classes[0]}: there is nothing to tell apart", stacklevel=2)
    _warn_of_other_images(train, val)
    label = {name: i for i, name in enumerate(classes)}
    images = {name: _images(train / name) for name in classes}
    if empty := [name for name in classes if not images[name]]:
        raise DataError(
            f"{train / empty[0]} holds no image ({', '.join(_SUFFIXES)}): a class without any cannot be learnt"
        )
    samples = [(p, label[name]) for name in classes for p in images[name]]
    annotations = val / "val_annotations.txt"
    if annotations.is_file():  # Tiny ImageNet: file name, class, box
        try:
            lines = annotations.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{annotations} is no text ({error})") from None
        rows = [line.split("\t")[:2] for line in lines if line.strip()]
        if any(len(row) != 2 for row in rows):
            raise DataError(f"{annotations} must hold lines of a file name and its class, with a tab between")
        held_out = [(val / "images" / name, label.get(kind)) for name, kind in rows]
    else:
        held_out = [(p, label.get(d.name)) for d in _classes(val) for p in _images(d)]
    if any(kind is None for _, kind in held_out):
        raise DataError(f"{val} has classes that {train} has not")
    splits = []
    for where, part in ((train, samples), (val, held_out)):
        if not part:
            raise DataError(f"no images in {where}")
        paths, labels = zip(*part)
        splits.append((FolderImages(list(paths), resize), torch.tensor(labels)))
    return splits, len(classes)
