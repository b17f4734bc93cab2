"""The data sets of the command: what they are called, where they lie, how they are normalised and augmented."""

from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import augment, readers
from .readers import DataError

_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# resize: shorter side on loading; size: what the network sees; crop: padding of the random crop (None: no crop)
Recipe = namedtuple("Recipe", "resize size crop flip erase")
Source = namedtuple("Source", "title statistics recipes needs_folder")

_CIFAR_RECIPES = {"basic": Recipe(None, 32, None, True, 0.0), "full": Recipe(None, 32, 4, True, 0.2)}
SOURCES = {
    "fashion-mnist": Source("Fashion-MNIST", ((0.286,), (0.353,)), {"basic": Recipe(None, 28, 4, True, 0.0)}, False),
    "mnist": Source("MNIST", ((0.5,), (0.5,)), {"basic": Recipe(None, 28, 4, False, 0.0)}, True),
    "cifar10": Source("CIFAR-10", _CIFAR, _CIFAR_RECIPES, True),
    "cifar10-jpeg": Source("CIFAR-10, JPEG copy", _CIFAR, _CIFAR_RECIPES, True),
    "cifar100": Source("CIFAR-100", _CIFAR, _CIFAR_RECIPES, True),
    "imagenette": Source(
        "Imagenette", _IMAGENET, {"basic": Recipe(132, 128, 0, True, 0.0), "full": Recipe(160, 128, 0, True, 0.2)}, True
    ),
    "tiny-imagenet": Source(
        "Tiny ImageNet",
        _IMAGENET,
        {"basic": Recipe(64, 64, None, True, 0.0), "full": Recipe(64, 64, None, True, 0.2)},
        True,
    ),
    "vww": Source("Visual Wake Words", _IMAGENET, {"basic": Recipe(132, 128, 0, True, 0.0)}, True),
    "image-folder": Source(
        "image folder",
        _IMAGENET,
        {"basic": Recipe(132, 128, 0, True, 0.0), "full": Recipe(132, 128, 0, True, 0.2)},
        True,
    ),
}


class Dataset:
    """Two splits of (images, labels): images a uint8 tensor (N, C, H, W), or decoded on indexing."""

    def __init__(self, title, train, test, classes, statistics, recipe):
        self.title, self.train, self.test, self.classes, self.recipe = title, train, test, classes, recipe
        self.mean, self.std = (torch.tensor(s).view(1, -1, 1, 1) for s in statistics)
        self.channels, self.image_size = len(statistics[0]), recipe.size

    def training_batch(self, indices, generator):
        """Augmented, normalised float32 images, and labels, of the training split."""
        images, labels = self.train
        batch = images[indices]
        recipe = self.recipe
        if recipe.crop is not None:
            batch = augment.random_crop(batch, recipe.size, recipe.crop, generator)
        if recipe.flip:
            batch = augment.random_flip(batch, generator)
        batch = self._resized(self._normalize(batch))
        return augment.random_erase(batch, recipe.erase, generator) if recipe.erase else batch, labels[indices]

    def test_batches(self, batch_size):
        images, labels = self.test
        for indices in torch.arange(len(labels)).split(batch_size):
            yield (
                self._resized(self._normalize(augment.center_crop(images[indices], self.recipe.size))),
                labels[indices],
            )

    def _resized(self, batch):
        if batch.shape[-1] == self.image_size:
            return batch
        return F.interpolate(batch, size=(self.image_size,) * 2, mode="bilinear", antialias=True)

    def _normalize(self, batch):
        return batch.float().div_(255).sub_(self.mean).div_(self.std)

    def truncated(self, count):
        """`count` samples of each split, drawn by a fixed seed: folders are sorted by class (None: all)."""
        clone = object.__new__(Dataset)
        clone.__dict__.update(self.__dict__)
        if count is not None:
            clone.train, clone.test = (_some(split, count) for split in (self.train, self.test))
            clone.title += f", cut to {len(clone.train[1]):,} + {len(clone.test[1]):,}"
        return clone


def _some(split, count):
    images, labels = split
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return images[chosen], labels[chosen]


def load(name, folder=None, augmentation="basic"):
    """Dataset `name` (one of `SOURCES`) from `folder`; fashion-mnist without a folder is the embedded subset.

    Raises DataError with one line for the user.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; expected one of: {', '.join(SOURCES)}")
    source = SOURCES[name]
    recipes = {**source.recipes, "none": next(iter(source.recipes.values()))._replace(flip=False, erase=0.0)}
    if augmentation not in recipes:
        raise DataError(f"unknown augmentation {augmentation!r} of {name}; expected one of: {', '.join(recipes)}")
    recipe = recipes[augmentation]
    if augmentation == "none" and (recipe.resize is None or recipe.resize == recipe.size):
        recipe = recipe._replace(crop=None)
    if folder is None and source.needs_folder:
        raise DataError(f"data set {name} needs --data-dir, the folder that holds it")
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"data folder {folder} does not exist")
    title, classes = source.title, 100 if name == "cifar100" else 10
    try:
        if folder is None:
            splits, title = _embedded(), "Fashion-MNIST subset, 10,000 + 2,000 images"
        elif name in ("fashion-mnist", "mnist"):
            splits = readers.mnist(folder, name)
        elif name in ("cifar10", "cifar100"):
            splits = readers.cifar(folder, classes)
        elif name == "cifar10-jpeg":
            splits = readers.cifar10_jpeg(folder)
        else:
            splits, classes = readers.image_folder(folder, recipe.resize, None if name == "image-folder" else name)
    except OSError as error:  # no right to read, a file that is a folder, a drive that is gone
        raise DataError(f"{error.filename or folder} cannot be read ({error.strerror or error})") from None
    for part, (images, labels) in zip(("training", "test"), splits):
        if len(images) != len(labels) or not len(labels):
            raise DataError(f"{name}: {len(images)} {part} images and {len(labels)} labels, expected as many, and some")
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(
                f"{name}: {part} labels must lie in [0, {classes - 1}], got {int(labels.min())} to {int(labels.max())}"
            )
    return Dataset(title, *splits, classes, source.statistics, recipe)


def _embedded():
    path = Path(__file__).parent / "assets" / "fashion_mnist_12k.npz"
    with np.load(path, allow_pickle=False) as file:
        return [
            (torch.from_numpy(file[f"x_{part}"]).unsqueeze(1), torch.from_numpy(file[f"y_{part}"].astype(np.int64)))
            for part in ("train", "test")
        ]
