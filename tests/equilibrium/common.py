"""The authors' vectors: dicts as the public functions take them."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "golden" / "holo_ep"
DENSE = ("mlp_a30_f64", "loop_f64", "mlp_dsilu_a0_f64")
CONV = "cnn_small_f64"
TOLERANCE = 1e-10


class Golden:
    def __init__(self, name, dtype=torch.float64):
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.data = {key: np.array(file[key]) for key in file.files}
        self.name, self.dtype, self.conv = name, dtype, name == CONV
        self.meta = eval(str(self.data.pop("meta")))
        self.activation = self.meta["act"]
        self.weights = self.group("params")
        self.x, self.y = self["x"], self["y"].to(dtype)

    def __getitem__(self, key):
        return self.tensor(key)

    def tensor(self, key):
        value = torch.from_numpy(self.data[key])
        if self.conv and value.dim() >= 4:
            if key.endswith("kernel"):
                value = value.permute(3, 2, 0, 1)
            else:
                value = value.movedim(-1, -3)
        value = value.contiguous()
        return value.to(self.dtype) if value.is_floating_point() else value

    def group(self, prefix):
        """{rest of the key: tensor} of the keys below `prefix`."""
        return {key[len(prefix) + 1 :]: self.tensor(key) for key in self.data if key.startswith(prefix + "/")}

    def has(self, prefix):
        return any(key.startswith(prefix + "/") for key in self.data)


@cache
def golden(name, dtype=torch.float64):
    return Golden(name, dtype)


def close(name, got, expected, tolerance=TOLERANCE, scale=None):
    """Dicts of tensors, by the largest entry of each."""
    assert sorted(got) == sorted(expected), name
    for key, value in expected.items():
        assert got[key].shape == value.shape, (name, key, got[key].shape)
        size = max(value.abs().max().item(), 0 if scale is None else scale.get(key, 0))
        error = (got[key].detach() - value).abs().max().item()
        assert error <= tolerance * max(size, 1e-30), f"{name} {key}: {error:.2e} of {size:.2e}"
