"""Valid calls of the family's public functions and optimizer."""

import torch

from lgkernels.optim import ZerothOrder
from lgkernels.random import RandomFeedback
from tests.support.calls import Call
from tests.support.problems import randn

CALLS = {
    "perturbed_linear": Call(
        dict(x=randn(3, 2, 5), weight=randn(4, 5), bias=randn(4), noise=randn(4, 5), coefficients=0.5),
        free={"x": (0, 1)},
        dims={"x": (2, 4)},
        any_sign=("coefficients",),
    ),
    "perturbed_conv2d": Call(
        dict(
            x=randn(3, 2, 4, 6, 6),
            weight=randn(6, 2, 3, 3),
            bias=randn(6),
            stride=2,
            padding=1,
            dilation=1,
            groups=2,
            noise=randn(6, 2, 3, 3),
            coefficients=0.5,
        ),
        free={"x": (0, 1, 3, 4)},
        dims={"x": (4,)},
        any_sign=("coefficients",),
    ),
    "perturbed_embedding": Call(
        dict(x=torch.tensor([[1, 2], [0, 3], [2, 2]]), weight=randn(4, 5), noise=randn(4, 5), coefficients=0.5),
        free={"x": (0, 1)},
        dims={"x": (1, 3)},
        any_sign=("coefficients",),
    ),
    "perturbed_layer_norm": Call(
        dict(
            x=randn(3, 2, 5),
            normalized_shape=(5,),
            weight=randn(5),
            bias=randn(5),
            eps=1e-5,
            noise=randn(5),
            coefficients=0.5,
        ),
        free={"x": (0, 1)},
        dims={"x": (2, 4)},
        any_sign=("coefficients",),
    ),
    "perturbed_rms_norm": Call(
        dict(x=randn(3, 2, 5), normalized_shape=(5,), weight=randn(5), eps=1e-5, noise=randn(5), coefficients=0.5),
        free={"x": (0, 1)},
        dims={"x": (2, 4)},
        any_sign=("coefficients",),
    ),
    "perturbed_group_norm": Call(
        dict(
            x=randn(3, 2, 4, 5),
            num_groups=2,
            weight=randn(4),
            bias=randn(4),
            eps=1e-5,
            noise=randn(4),
            coefficients=0.5,
        ),
        free={"x": (0, 1, 3)},
        dims={"x": (3, 5)},
        any_sign=("coefficients",),
    ),
    # all of the weight decays: a call that is repeated gives the same
    "formula_update_": Call(
        dict(weight=randn(4, 5), noise=RandomFeedback(1), coefficients=0.5, weight_decay=1.0),
        free={"weight": (0, 1)},
        dims={"weight": (1, 3)},
        any_sign=("coefficients",),
        compiles=False,
    ),
}

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
MODULES = {
    "ZerothOrder": Call(dict(model=MODEL, lr=0.1, include=None), any_sign=("seed",)),
    "ZerothOrderLog": Call(dict(seed=0, law="sign", members=2, parameters=["0.weight"]), any_sign=("seed",)),
    "replay": Call(dict(model=MODEL, log=ZerothOrder(MODEL, 0.1).log)),
}
