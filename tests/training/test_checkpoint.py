"""Checkpoints: whole or not at all, and nothing in them is trusted."""

import json

import pytest
import torch

from lgkernels.recipes import checkpoint
from lgkernels.recipes.checkpoint import CheckpointError

safetensors = pytest.importorskip("safetensors.torch")

TREE = {
    "step": 3,
    "lr": 0.1 + 0.2,
    "name": "lls",
    "none": None,
    "flags": (True, [1, 2.5]),
    7: {0: torch.arange(6).view(2, 3)},
    "half": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "state": [None, {"rng": torch.get_rng_state(), "strided": torch.randn(4, 5).t()}],
}


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return one == two and type(one) is type(two)


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "c", TREE)
    assert same(checkpoint.load(tmp_path / "c"), TREE)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_it_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="got set at state.a"):
        checkpoint.save(tmp_path / "c", {"a": {1}})


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_short(tmp_path, keep):
    checkpoint.save(tmp_path / "c", TREE)
    raw = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match="corrupt or cut short"):
        checkpoint.load(tmp_path / "c")


def test_one_flipped_bit(tmp_path):
    checkpoint.save(tmp_path / "c", TREE)
    raw = bytearray((tmp_path / "c").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "c").write_bytes(raw)
    with pytest.raises(CheckpointError, match="do not match their digest"):
        checkpoint.load(tmp_path / "c")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "c").write_bytes(safetensors.save({"weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        checkpoint.load(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "d")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", {"step": 1})
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "c", {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "c") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_tree_is_plain_json(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": 1})
    with safetensors.safe_open(str(tmp_path / "c"), framework="pt") as file:
        assert json.loads(file.metadata()["tree"]) == {"dict": [["a", {"value": 1}]]}
