"""Readers on small files made here, the embedded data set, and the augmentations."""

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lgkernels.recipes import augment, data, readers
from lgkernels.recipes.data import DataError

RNG = np.random.default_rng(0)


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def mnist_folder(tmp_path):
    arrays = {
        "train-images-idx3-ubyte": pixels(5, 28, 28),
        "train-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
        "t10k-images-idx3-ubyte.gz": pixels(3, 28, 28),
        "t10k-labels-idx1-ubyte.gz": np.arange(3, dtype=np.uint8),
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)) if name.endswith("gz") else idx(array))
    return tmp_path, arrays


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(mnist_folder, name):
    folder, arrays = mnist_folder
    loaded = data.load(name, folder)
    assert np.array_equal(loaded.train[0].squeeze(1).numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(loaded.test[0].squeeze(1).numpy(), arrays["t10k-images-idx3-ubyte.gz"])
    assert loaded.test[1].tolist() == [0, 1, 2] and loaded.classes == 10 and loaded.image_size == 28


@pytest.mark.parametrize(
    "raw, message",
    [
        (idx(pixels(5, 28, 28))[:-1], "cut short"),
        (b"\0\0\x08", "not a complete IDX"),
        (b"PK\x03\x04zip", "not an IDX file"),
        (bytes([0, 0, 8, 255]) + bytes(1020), "not an IDX file"),  # more dimensions than an array can have
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "cut short: 3402823"),  # more bytes than int64 can count
        (gzip.compress(idx(pixels(5, 28, 28)))[:200], "not a complete IDX"),
    ],
)
def test_bad_idx(mnist_folder, raw, message):
    folder, _ = mnist_folder
    (folder / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        data.load("mnist", folder)


def cifar_python(folder, classes, count=4, extra=None):
    key = b"labels" if classes == 10 else b"fine_labels"
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    folder.mkdir()
    batches = {}
    for name in names:
        batches[name] = {
            b"data": pixels(count, 3072),
            key: [int(v) for v in RNG.integers(0, classes, count)],
            **(extra or {}),
        }
        (folder / name).write_bytes(pickle.dumps(batches[name], protocol=2))
    return batches


@pytest.mark.parametrize("classes, name", [(10, "cifar-10-batches-py"), (100, "cifar-100-python")])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_python(tmp_path, classes, name, inside):
    batches = cifar_python(tmp_path / name, classes)
    loaded = data.load(f"cifar{classes}", tmp_path if inside else tmp_path / name)
    test = batches["test_batch" if classes == 10 else "test"]
    assert np.array_equal(loaded.test[0].reshape(-1, 3072).numpy(), test[b"data"])
    assert loaded.test[1].tolist() == test[b"labels" if classes == 10 else b"fine_labels"]
    assert loaded.train[0].shape == ((20 if classes == 10 else 4), 3, 32, 32) and loaded.classes == classes


@pytest.mark.parametrize("classes, name, coarse", [(10, "cifar-10-batches-bin", 0), (100, "cifar-100-binary", 1)])
def test_cifar_binary(tmp_path, classes, name, coarse):
    folder = tmp_path / name
    folder.mkdir()
    rows = {}
    names = (
        [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    for file in names:
        rows[file] = pixels(3, 3073 + coarse)
        rows[file][:, coarse] %= classes
        rows[file].tofile(folder / file)
    loaded = data.load(f"cifar{classes}", tmp_path)
    assert np.array_equal(loaded.test[0].reshape(3, -1).numpy(), rows[names[-1]][:, 1 + coarse :])
    assert loaded.test[1].tolist() == rows[names[-1]][:, coarse].tolist()
    with open(folder / names[-1], "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="no multiple of"):
        data.load(f"cifar{classes}", tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_cannot_run_code(tmp_path):
    trace = tmp_path / "executed"
    cifar_python(tmp_path / "cifar-10-batches-py", 10, extra={b"extra": Malicious(trace)})
    with pytest.raises(DataError, match="which is no array"):
        data.load("cifar10", tmp_path)
    assert not trace.exists()


def jpeg(array, quality=90):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(array).save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_cifar10_jpeg(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        files = [jpeg(pixels(32, 32, 3)) for _ in range(3)]
        start = files[0].index(b"\xff\xda")  # all up to the scan is the same for every image
        assert all(f[:start] == files[0][:start] for f in files)
        bodies = [f[start:] for f in files]
        np.savez(
            tmp_path / f"cifar10_{split}.npz",
            header=np.frombuffer(files[0][:start], np.uint8),
            bytes=np.frombuffer(b"".join(bodies), np.uint8),
            labels=np.array([3, 1, 2], np.uint8),
            offsets=np.cumsum([0] + [len(b) for b in bodies]),
        )
    loaded = data.load("cifar10-jpeg", tmp_path)
    with image.open(io.BytesIO(files[2])) as picture:
        assert np.array_equal(loaded.test[0][2].permute(1, 2, 0).numpy(), np.asarray(picture))
    assert loaded.test[1].tolist() == [3, 1, 2] and "JPEG copy" in loaded.title


@pytest.mark.parametrize("annotated", [False, True])
def test_image_folders(tmp_path, annotated):
    pytest.importorskip("PIL")
    root = tmp_path / "tiny-imagenet-200"
    for i, name in enumerate(("n01", "n02")):
        where = root / "train" / name / ("images" if annotated else "")
        where.mkdir(parents=True)
        for j in range(2):
            (where / f"{name}_{j}.JPEG").write_bytes(jpeg(np.full((64, 80, 3), 100 * i + 10 * j, np.uint8)))
    where = root / "val" / ("images" if annotated else "n02")
    where.mkdir(parents=True)
    (where / "val_0.JPEG").write_bytes(jpeg(np.full((64, 64, 3), 100, np.uint8)))
    if annotated:
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    loaded = data.load("tiny-imagenet", tmp_path)
    assert loaded.classes == 2 and loaded.train[1].tolist() == [0, 0, 1, 1] and loaded.test[1].tolist() == [1]
    batch = loaded.train[0][torch.tensor([3, 0])]
    assert batch.shape == (2, 3, 64, 64) and batch.dtype == torch.uint8
    assert (batch.float().mean((1, 2, 3)) - torch.tensor([110.0, 0.0])).abs().max() < 3
    x, target = loaded.training_batch(torch.arange(4), torch.Generator().manual_seed(0))
    assert x.shape == (4, 3, 64, 64) and target.tolist() == [0, 0, 1, 1]
    ((x, _),) = loaded.test_batches(8)
    assert x.shape == (1, 3, 64, 64)


def test_image_folders_resize(tmp_path):
    pytest.importorskip("PIL")
    for where in (tmp_path / split / kind for split in ("train", "val") for kind in ("cat", "dog")):
        where.mkdir(parents=True)
        (where / "a.jpg").write_bytes(jpeg(pixels(50, 100, 3)))
    loaded = data.load("vww", tmp_path)
    assert loaded.train[0][torch.tensor([0])].shape == (1, 3, 132, 132)
    x, _ = loaded.training_batch(torch.tensor([0]), torch.Generator())
    assert x.shape == (1, 3, 128, 128)


def test_embedded_subset():
    loaded = data.load("fashion-mnist")
    assert loaded.train[0].shape == (10000, 1, 28, 28) and loaded.test[0].shape == (2000, 1, 28, 28)
    assert torch.bincount(loaded.train[1]).tolist() == [1000] * 10
    assert torch.bincount(loaded.test[1]).tolist() == [200] * 10
    x, _ = next(iter(loaded.test_batches(2000)))
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
    assert "MIT License" in (Path(data.__file__).parent / "assets" / "LICENSE-fashion-mnist.txt").read_text()
    assert len(loaded.truncated(7).train[1]) == len(loaded.truncated(7).test[0]) == 7


@pytest.mark.parametrize(
    "images, labels, message",
    [
        ((5, 28, 28), np.arange(4, dtype=np.uint8), "5 training images and 4 labels"),
        ((5, 28, 28), np.full(5, 11, np.uint8), "labels must lie in .0, 9., got 11"),
        ((5, 20, 28), np.arange(5, dtype=np.uint8), "must hold images"),
        ((0, 28, 28), np.empty(0, np.uint8), "0 training"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, images, labels, message):
    (tmp_path / "MNIST/raw").mkdir(parents=True)  # torchvision's layout
    for prefix in ("train", "t10k"):
        (tmp_path / f"MNIST/raw/{prefix}-images-idx3-ubyte").write_bytes(idx(pixels(*images)))
        (tmp_path / f"MNIST/raw/{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match=message):
        data.load("mnist", tmp_path)


def test_truncation_draws_from_all_classes():
    loaded = data.load("fashion-mnist")
    ordered = loaded.train[1].argsort()
    loaded.train = tuple(part[ordered] for part in loaded.train)
    assert torch.equal(loaded.truncated(40).train[1], loaded.truncated(40).train[1])
    assert len(loaded.truncated(40).train[1].unique()) > 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("imagenet",), "unknown data set 'imagenet'; expected one of: fashion-mnist"),
        (("cifar10",), "needs --data-dir"),
        (("mnist", "/no/such/folder"), "/no/such/folder does not exist"),
        (
            ("fashion-mnist", None, "heavy"),
            "unknown augmentation 'heavy' of fashion-mnist; expected one of: basic, none",
        ),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(DataError, match=message):
        data.load(*arguments)


def test_empty_folder(tmp_path):
    for name in ("mnist", "cifar10", "cifar100", "cifar10-jpeg", "imagenette"):
        with pytest.raises(DataError, match="^no "):
            data.load(name, tmp_path)


def test_random_crop_takes_windows_of_the_padded_image():
    images = torch.arange(1, 6 * 2 * 9 + 1).float().view(6, 2, 3, 3)
    generator = torch.Generator().manual_seed(0)
    crops = augment.random_crop(images, 3, 1, generator)
    padded = torch.nn.functional.pad(images, (1,) * 4)
    offsets = set()
    for image, crop in zip(padded, crops):
        hits = [(i, j) for i in range(3) for j in range(3) if torch.equal(image[:, i : i + 3, j : j + 3], crop)]
        assert len(hits) == 1
        offsets.add(hits[0])
    assert len(offsets) > 1
    with pytest.raises(ValueError, match="at least 9 x 9"):
        augment.random_crop(images, 9, 1, generator)


def test_random_flip():
    images = torch.rand(200, 1, 2, 3)
    out = augment.random_flip(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 70 < same.sum() < 130


def test_random_erase():
    images = torch.ones(2000, 2, 20, 16)
    out = augment.random_erase(images, 0.2, torch.Generator().manual_seed(0))
    erased = out == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    touched = erased[:, 0].flatten(1).any(1)
    assert 0.16 < touched.float().mean() < 0.24
    for mask in erased[touched, 0][:50]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < mask.float().mean() < 0.36
    assert torch.equal(augment.random_erase(images, 0.0, torch.Generator()), images)


def test_batches_depend_on_the_generator_alone():
    loaded = data.load("fashion-mnist")
    one, two, other = (loaded.training_batch(torch.arange(16), torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_folder_reader_reports_what_it_cannot_decode(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    images = readers.FolderImages([tmp_path / "broken.jpg"], 32)
    with pytest.raises(DataError, match="broken.jpg cannot be decoded"):
        images[torch.tensor([0])]


def idx_files(folder, value, parts=("images-idx3", "labels-idx1")):
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for part in parts:
            array = np.full((2, 28, 28) if "images" in part else 2, value, np.uint8)
            (folder / f"{prefix}-{part}-ubyte").write_bytes(idx(array))


def values(name, folder):
    loaded = data.load(name, folder)
    return [int(part.max()) for split in (loaded.train, loaded.test) for part in split]


def test_the_set_that_the_folder_names(tmp_path):
    """Torchvision's root holds several sets of files with the same names."""
    for value, name in enumerate(("EMNIST", "FashionMNIST", "KMNIST", "MNIST")):
        idx_files(tmp_path / name / "raw", value)
    assert values("mnist", tmp_path) == [3] * 4 and values("fashion-mnist", tmp_path) == [1] * 4
    assert values("mnist", tmp_path / "KMNIST") == [2] * 4  # given itself
    (tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="^no t10k-labels-idx1-ubyte or .* in .*FashionMNIST/raw$"):
        data.load("fashion-mnist", tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / "numbers")  # no name says what it is, those of the others do
    assert values("mnist", tmp_path) == [3] * 4
    idx_files(tmp_path / "digits", 4)
    with pytest.raises(DataError, match="digits and .*numbers/raw both match mnist: give one of them"):
        data.load("mnist", tmp_path)
    idx_files(tmp_path / "only/KMNIST", 5)
    with pytest.raises(DataError, match="no mnist in .*: .*KMNIST is named for KMNIST, EMNIST or the like"):
        data.load("mnist", tmp_path / "only")


def test_a_set_of_one_folder(tmp_path):
    """Images of one folder never meet the labels of another."""
    idx_files(tmp_path / "a", 0, ["images-idx3"])
    idx_files(tmp_path / "b", 1, ["labels-idx1"])
    with pytest.raises(DataError, match="^no train-labels-idx1-ubyte or .* in .*a$"):
        data.load("mnist", tmp_path)
    idx_files(tmp_path / "c", 2)
    assert values("mnist", tmp_path) == [2] * 4


def test_the_image_folder_that_the_set_names(tmp_path):
    pytest.importorskip("PIL")
    for count, root in enumerate(("imagenette2-160", "tiny-imagenet-200"), 2):
        for split in ("train", "val"):
            for label in range(count):
                (tmp_path / root / split / str(label)).mkdir(parents=True)
                (tmp_path / root / split / str(label) / "1.jpg").write_bytes(jpeg(pixels(8, 8, 3)))
    for split in ("train", "test"):  # files of these names are no folders of images
        (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
        (tmp_path / "cifar-100-python" / split).write_bytes(b"")
    assert data.load("tiny-imagenet", tmp_path).classes == 3 and data.load("imagenette", tmp_path).classes == 2
    with pytest.raises(DataError, match="imagenette2-160 and .*tiny-imagenet-200 both match an image folder"):
        data.load("image-folder", tmp_path)
