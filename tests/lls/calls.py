"""Valid calls of the family's public functions."""

import torch

from tests.support.calls import Call
from tests.support.problems import randn

CALLS = {
    "lls_basis": Call(dict(rows=3, dim=5, min_freq=1.0, max_freq=2.0), any_sign=("min_freq", "max_freq")),
    "lls_loss": Call(
        dict(
            activation=randn(2, 3, 4, 5),
            target=torch.tensor([0, 6]),
            modulation=randn(5, 7),
            num_classes=7,
            pool_size=2,
            basis=randn(5, 12),
        ),
        free={"activation": (2, 3)},
        any_sign=("basis_scale", "ignore_index"),
        any_dtype=("basis",),
    ),
}

HEAD = dict(num_classes=3, pool_size=2, basis=randn(3, 16), loss="hard_sigmoid_mse")
SIGNED = ("negative_slope", "basis_scale")
MODULES = {
    "LLSConvBlock": Call(
        dict(HEAD, in_channels=2, out_channels=4, kernel_size=3), any_sign=("negative_slope", "basis_scale")
    ),
    "LLSLinearBlock": Call(dict(HEAD, in_features=2, out_features=4), any_sign=("negative_slope", "basis_scale")),
    "LLSHead": Call(dict(HEAD, block=torch.nn.Linear(2, 4)), any_sign=("basis_scale",)),
}
