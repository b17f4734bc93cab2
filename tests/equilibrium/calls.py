"""Valid calls of the family's public functions."""

import torch

import lgkernels.nn as lnn
from lgkernels.random import RandomFeedback
from tests.support.calls import Call
from tests.support.problems import randn

WEIGHTS = {
    "in-h/kernel": randn(5, 4) / 4,
    "in-h/bias": randn(4) / 4,
    "h-out/kernel": randn(4, 3) / 4,
    "h-out/bias": randn(3) / 4,
    "out-h/kernel": randn(3, 4) / 4,
    "readout/Dense_0/kernel": randn(3, 6),
    "readout/Dense_0/bias": randn(6),
}
X, TARGET = randn(3, 5), torch.tensor([0, 5, 3])
NOISE = RandomFeedback(0, law="normal")
STATE = {"h": randn(3, 4), "out": randn(3, 3)}
NET = dict(weights=WEIGHTS, x=X)
SETTLE = dict(**NET, state=STATE, steps=3, beta=0.1, target=TARGET, tolerance=1e-3)
LEARN = dict(**NET, target=TARGET, state=STATE)

CALLS = {
    "ep_settle": Call(SETTLE, any_sign=("beta",)),
    "ep_settle_report": Call(SETTLE, any_sign=("beta",), compiles=False),
    "ep_residual": Call(dict(**NET, state=STATE)),
    "holomorphic_ep_error": Call(dict(**LEARN, beta=0.1, points=2, steps=3)),
    "ep_gradients": Call(dict(**LEARN, error=STATE)),
    "continuous_ep_error": Call(dict(**NET, target=TARGET, beta=0.1, points=4, plateaus=4, steps=3), compiles=False),
    "recurrent_backprop_error": Call(dict(**LEARN, steps=3), compiles=False),
    "bptt_gradients": Call(dict(**LEARN, steps=3), compiles=False),
    "homeostatic_loss": Call(dict(weights=WEIGHTS, activities=STATE, noise=NOISE)),
    "jacobian_symmetry": Call(dict(weights=WEIGHTS, activities=STATE, noise=NOISE), compiles=False),
    "weight_angle": Call(dict(weights=WEIGHTS), compiles=False),
    "softmax_pool2d": Call(dict(x=randn(3, 4, 6, 6)), free={"x": (0, 1, 2, 3)}, dims={"x": (3,)}),
}

MODULES = {
    "EquilibriumMLP": Call(dict(in_features=4, hidden=(5,), out_features=3, num_classes=2, steps=3)),
    "EquilibriumConvNet": Call(dict(in_channels=1, channels=(2, 3), num_classes=2, steps=3)),
    "HopfieldNet": Call(dict(input_shape=(4,), layers=(5, 3), steps=3)),
    "EquilibriumTrainer": Call(
        dict(
            model=lnn.EquilibriumMLP(4, (5,), 3, steps=3),
            optimizer_factory=lambda parameters: torch.optim.SGD(parameters, 0.1),
        ),
        any_sign=("seed",),
    ),
}
APPLIED = {
    "EquilibriumMLP": (lambda: lnn.EquilibriumMLP(4, (5,), 3, steps=3, angle=90), (randn(3, 4),), ("ep_settle",)),
    "EquilibriumConvNet": (
        lambda: lnn.EquilibriumConvNet(1, (2, 3), num_classes=2, steps=2, angle=45),
        (randn(2, 1, 8, 8),),
        ("ep_settle",),
    ),
    "HopfieldNet": (
        lambda: lnn.HopfieldNet((1, 6, 6), [dict(channels=2, pool="max"), 3], steps=2),
        (randn(2, 1, 6, 6),),
        ("HopfieldNet",),
    ),
}
