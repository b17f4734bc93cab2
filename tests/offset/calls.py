"""Valid arguments of the family's optimizers; it has no function in lgkernels.functional."""

import torch

from tests.support.calls import Call

CALLS: dict[str, Call] = {}
WEIGHT = torch.nn.Parameter(torch.ones(3))
DATA = torch.ones(4, 3)


def loss(x):
    return (WEIGHT * x).mean()


COEFFICIENTS = ("local_scale", "offset_scale", "bp_coef", "local_coef")
MODULES = {
    "OffsetSGD": Call(dict(params=[torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.5), any_sign=COEFFICIENTS),
    "OffsetOptimizer": Call(
        dict(optimizer=torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])), any_sign=COEFFICIENTS
    ),
    "refresh_due": Call(dict(step=3, period=2, first_period=1)),
}
