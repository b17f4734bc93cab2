"""Data as people's discs hold it: what systems leave beside it, damaged files, and files that other programs wrote."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch

from lgkernels.recipes import data
from lgkernels.recipes.readers import DataError

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)


def picture(path, value=0, size=(140, 140)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def folder(root, classes="abc"):
    for part in ("train", "val"):
        for i, name in enumerate(classes):
            picture(root / part / name / "1.png", 40 * i)
    return root


JUNK = [
    "train/.ipynb_checkpoints/1.png",
    "train/@eaDir/1.png",
    "val/@__thumb/1.png",
    "val/.hidden/1.png",
    "train/a/@eaDir/1.jpg/SYNO.png",
]
JUNK += [
    "train/b/._1.png",
    "val/b/.thumbs/1.png",
    "__MACOSX/train/a/._1.png",
    ".Trash/train/z/1.png",
    "train/__MACOSX/1.png",
]


@pytest.mark.parametrize("inside", [False, True])
def test_what_systems_leave_is_no_data(tmp_path, inside):
    root = folder(tmp_path / "z" if inside else tmp_path)
    clean = data.load("image-folder", tmp_path)
    for name in JUNK:
        picture((tmp_path if name[0] in "_." else root) / name)
        (root / "train" / "a" / "._2.png").write_bytes(b"Mac OS X")
    (root / "train" / "c" / "folder.png").mkdir()
    got = data.load("image-folder", tmp_path)
    assert got.classes == 3
    for one, two in ((got.train, clean.train), (got.test, clean.test)):
        assert one[1].tolist() == two[1].tolist() and one[0].paths == two[0].paths
    assert torch.equal(got.train[0][torch.arange(3)], clean.train[0][torch.arange(3)])


def test_a_class_without_images(tmp_path):
    (folder(tmp_path) / "train" / "d").mkdir()
    (tmp_path / "train" / "d" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"train/d holds no image \(.jpg, .*\): a class without any cannot be learnt"):
        data.load("image-folder", tmp_path)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def broken_chunk(path):
    picture(path)
    raw = path.read_bytes()
    at = raw.index(b"IDAT") - 4
    (size,) = struct.unpack(">I", raw[at : at + 4])
    body = raw[at + 8 : at + 8 + size]
    half = size // 2
    path.write_bytes(
        raw[:at] + chunk(b"IDAT", body[:half]) + struct.pack(">I", half) + b"\xa9\x8a\xbc\x07" + body[half:]
    )


def bomb(path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "damage", [broken_chunk, bomb, lambda path: path.write_bytes(b"GIF89a")], ids=["chunk", "bomb", "gif"]
)
def test_a_damaged_image_is_named(tmp_path, damage):
    folder(tmp_path)
    damage(tmp_path / "train" / "b" / "2.png")
    dataset = data.load("image-folder", tmp_path)
    with pytest.raises(DataError, match="b/2.png cannot be decoded"):
        dataset.train[0][torch.arange(4)]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
def test_grey_of_16_bits(tmp_path, dtype):
    """Not white, but what 8 bits of it are."""
    folder(tmp_path, "ab")
    grey = np.arange(140 * 140, dtype=np.uint16).reshape(140, 140) * 3
    Image.fromarray(grey if dtype is np.uint16 else (grey >> 8).astype(np.uint8)).save(
        tmp_path / "train" / "a" / "1.png"
    )
    got = data.load("image-folder", tmp_path, "none").train[0][torch.arange(1)][0].float()
    assert abs(got.mean().item() - (grey >> 8).mean()) < 1 and got.std() > 40


def test_a_thread_of_pixels_fills_no_memory(tmp_path, monkeypatch):
    folder(tmp_path, "ab")
    resize = Image.Image.resize

    def little(picture, size, *arguments):
        assert size[0] * size[1] < 2**24
        return resize(picture, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", little)
    picture(tmp_path / "train" / "a" / "1.png", 9, (2, 60_000))
    assert (data.load("image-folder", tmp_path).train[0][torch.arange(1)] == 9).all()


def test_images_that_are_not_read_are_counted(tmp_path):
    folder(tmp_path)
    for name in ("train/a/2.tif", "train/b/2.TIF", "val/c/2.gif", "train/a/@eaDir/3.gif", "train/c/boxes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        assert len(data.load("image-folder", tmp_path).train[1]) == 3
    (said,) = [str(warning.message) for warning in caught]
    assert "are left out, 1 of .gif, 2 of .tif: those of .jpg, " in said


def test_one_class_is_said(tmp_path):
    with pytest.warns(UserWarning, match="train holds one class alone, a: there is nothing to tell apart"):
        data.load("image-folder", folder(tmp_path, "a"))


def jpegs(path, count=6, **changes):
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    arrays = dict(
        header=np.zeros(0, np.uint8),
        bytes=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0] + [len(f) for f in files]),
        labels=np.zeros(count, np.int64),
    )
    for name in ("cifar10_train", "cifar10_test"):
        np.savez(path / f"{name}.npz", **{**arrays, **{key: change(arrays[key]) for key, change in changes.items()}})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(offsets=lambda o: o[:4]), "must hold one offset more than labels, got 4 and labels of shape (6,)"),
        (dict(labels=lambda v: v[:3]), "must hold one offset more than labels, got 7 and labels of shape (3,)"),
        (dict(offsets=lambda o: o[::-1].copy()), "must hold offsets that rise from 0 to its"),
        (dict(offsets=lambda o: o[[0, 2, 1, 3, 4, 5, 6]]), "must hold offsets that rise from 0 to its"),
        (dict(bytes=lambda b: b[:-9]), "must hold offsets that rise from 0 to its"),
        (dict(bytes=lambda b: b ^ 255), "image 0 of"),
    ],
)
def test_jpegs_that_do_not_fit_together(tmp_path, changes, message):
    jpegs(tmp_path, **changes)
    with pytest.raises(DataError) as caught:
        data.load("cifar10-jpeg", tmp_path)
    assert message in str(caught.value)


def cifar(root, protocol=2, data=None, labels=None, key=str.encode):
    root = root / "cifar-10-batches-py"
    root.mkdir()
    pixels = RNG.integers(0, 255, (4, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            key("data"): pixels if data is None else data,
            key("labels"): [0, 1, 2, 3] if labels is None else labels,
        }
        (root / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return pixels


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("key", [str.encode, str], ids=["bytes", "str"])
@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2, 3],
        np.arange(4),
        np.arange(4, dtype=np.uint8),
        [np.int64(i) for i in range(4)],
        np.arange(4).reshape(4, 1),
    ],
)
def test_cifar_written_again(tmp_path, protocol, key, labels):
    pixels = cifar(tmp_path, protocol, labels=labels, key=key)
    got = data.load("cifar10", tmp_path)
    assert got.test[1].tolist() == [0, 1, 2, 3] and np.array_equal(got.test[0].numpy().reshape(4, 3072), pixels)


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_of_raw_bytes(tmp_path, protocol):
    raw = RNG.integers(0, 255, 4 * 3072, dtype=np.uint8)
    cifar(tmp_path, protocol, data=bytearray(raw.tobytes()))
    assert np.array_equal(data.load("cifar10", tmp_path).test[0].numpy().reshape(-1), raw)


def test_cifar_of_numpys_other_home(tmp_path, monkeypatch):
    cifar(tmp_path, 3, labels=[np.int64(i) for i in range(4)])
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        raw = file.read_bytes()
        assert b"numpy._core" in raw
        file.write_bytes(raw.replace(b"numpy._core", b"numpy.core"))
    assert data.load("cifar10", tmp_path).test[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data=RNG.random((4, 3072))), "it holds images as float64"),
        (dict(labels=[0.0, 1.0, 2.0, 3.0]), "labels as float64, expected bytes and integers"),
        (dict(data=np.full((4, 3072), 300)), "images as int64"),
        (dict(labels=[0, 1]), "it holds 2 labels and images of shape"),
        (dict(key=str.upper), "no 'data'"),
    ],
)
def test_no_cifar_batch(tmp_path, changes, message):
    cifar(tmp_path, **changes)
    with pytest.raises(DataError) as caught:
        data.load("cifar10", tmp_path)
    assert "is not a CIFAR batch" in str(caught.value) and message in str(caught.value)


def test_a_file_that_is_a_folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").mkdir()
    with pytest.raises(DataError, match="train-images-idx3-ubyte is not a complete IDX file"):
        data.load("mnist", tmp_path)
    (tmp_path / "train").write_text("")
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="train cannot be read"):
        data.load("image-folder", tmp_path)
