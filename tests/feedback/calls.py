"""Valid calls of the family's public functions."""

import torch

from lgkernels.nn import SignSymmetricLinear, feedback_state
from tests.support.calls import Call
from tests.support.problems import randn

LINEAR = dict(x=randn(2, 5, seed=1), weight=randn(4, 5, seed=2), bias=randn(4, seed=3))
CONV = dict(x=randn(2, 6, 8, 9, seed=1), weight=randn(4, 3, 3, 2, seed=2), bias=randn(4, seed=3), groups=2)
IMAGES = dict(free={"x": (0, 2, 3)}, dims={"x": (3,)})

CALLS = {
    "feedback_linear": Call(dict(LINEAR, feedback=randn(4, 5)), free={"x": ...}, any_dtype=("feedback",)),
    "feedback_conv2d": Call(dict(CONV, feedback=randn(4, 3, 3, 2)), **IMAGES, any_dtype=("feedback",)),
    "sign_symmetric_linear": Call(dict(LINEAR, magnitude=randn(4, 5)), free={"x": ...}, any_dtype=("magnitude",)),
    "sign_symmetric_conv2d": Call(dict(CONV, magnitude=randn(4, 3, 3, 2)), **IMAGES, any_dtype=("magnitude",)),
    "feedback_projection": Call(
        dict(error=randn(2, 3), feedback=randn(3, 4, 5), shape=(4, 5)), free={"error": (0,)}, any_dtype=("feedback",)
    ),
    "target_projection": Call(
        dict(target=torch.tensor([0, 2]), feedback=randn(3, 4, 5), shape=(4, 5)),
        free={"target": (0,), "feedback": (0,)},
        any_dtype=("feedback",),
    ),
}

LINEAR_LAYER = dict(in_features=4, out_features=3)
CONVOLUTION = dict(in_channels=4, out_channels=6, kernel_size=3, groups=2)
MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
BRSF = SignSymmetricLinear(4, 3, rule="brsf")
SGD = torch.optim.SGD(MODEL.parameters(), 0.1)
MODULES = {
    "FeedbackAlignmentLinear": Call(LINEAR_LAYER, any_sign=("seed",)),
    "FeedbackAlignmentConv2d": Call(CONVOLUTION, any_sign=("seed",)),
    "SignSymmetricLinear": Call(LINEAR_LAYER, any_sign=("seed",)),
    "SignSymmetricConv2d": Call(CONVOLUTION, any_sign=("seed",)),
    "convert": Call(dict(model=MODEL, rule="fa", verbose=False), any_sign=("seed",)),
    "alignment": Call(dict(model=BRSF)),
    "weight_ratio": Call(dict(model=BRSF)),
    "feedback_state": Call(dict(model=BRSF)),
    "load_feedback_state": Call(dict(model=BRSF, state=feedback_state(BRSF))),
    "redraw_after": Call(dict(optimizer=SGD, model=BRSF)),
    "BatchManhattan": Call(dict(params=[torch.nn.Parameter(torch.ones(2))], lr=0.1)),
}
