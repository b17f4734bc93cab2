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
