"""Valid calls of the family's public functions, modules and trainers."""

import torch

import lgkernels.nn as lnn
from lgkernels.random import RandomFeedback
from tests.support.calls import Call
from tests.support.problems import randn

TARGET = torch.tensor([0, 5, 3])


class Square(torch.nn.Module):
    """A loss without inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self):
        return self.weight.square().sum()


HEAD = dict(weight=randn(8, 6), bias=randn(6))
HEAD_TANGENTS = dict(weight_tangent=randn(8, 6), bias_tangent=randn(6))
FEATURES = (3, 5, 2, 4)

CALLS = {
    "replicated_cross_entropy": Call(dict(x=randn(*FEATURES), **HEAD, target=TARGET), free={"x": (1,)}),
    "replicated_cross_entropy_dual": Call(
        dict(x=randn(*FEATURES), tangent=randn(*FEATURES), **HEAD, target=TARGET, **HEAD_TANGENTS)
    ),
    "replicated_nt_xent": Call(dict(x=randn(*FEATURES), y=randn(*FEATURES), **HEAD)),
    "replicated_nt_xent_dual": Call(
        dict(
            x=randn(*FEATURES),
            y=randn(*FEATURES),
            x_tangent=randn(*FEATURES),
            y_tangent=randn(*FEATURES),
            **HEAD,
            **HEAD_TANGENTS,
        )
    ),
    "forward_gradient": Call(
        dict(function=Square(), noise=RandomFeedback(0, law="sign")),  # one sign: exact
        compiles=False,
    ),
    "dual_linear": Call(
        dict(
            x=randn(3, 4),
            x_tangent=randn(3, 4),
            weight=randn(5, 4),
            bias=randn(5),
            weight_tangent=randn(5, 4),
            bias_tangent=randn(5),
        )
    ),
    "dual_group_linear": Call(
        dict(x=randn(3, 2, 4), x_tangent=randn(3, 2, 4), weight=randn(2, 5, 4), bias=randn(2, 5))
    ),
    "dual_norm_noise_relu": Call(
        dict(z=randn(3, 6), z_tangent=randn(3, 6), residual=randn(3, 6), noise=randn(3, 6), dim=1), any_sign=("dim",)
    ),
    "activity_perturbation_grad": Call(
        dict(x=randn(3, 4), z=randn(3, 6), y=randn(3, 6), coefficient=randn(3, 2), noise=randn(3, 6), dim=1),
        free={"x": (1,), "coefficient": (1,)},
        any_sign=("dim",),
    ),
}

MODULES = {
    "GroupLinear": Call(dict(groups=2, in_features=3, out_features=4)),
    "LocalMixerBlock": Call(dict(in_features=4, width=4, groups=2, patches=3, token_mixing=True, outputs=5)),
    "LocalMixer": Call(dict(config="S/2/4", image_size=4, in_channels=1, num_classes=3, blocks=2, width=8)),
    "ForwardGradientTrainer": Call(
        dict(
            model=lnn.LocalMixer("S/2/4", image_size=4, in_channels=1, num_classes=3, blocks=1, width=8),
            optimizer_factory=lambda parameters: torch.optim.SGD(parameters, 0.1),
        ),
        any_sign=("seed",),
        methods={
            "step": dict(x=torch.ones(2, 1, 4, 4), target=torch.tensor([0, 1])),
            "predict": dict(x=torch.ones(2, 1, 4, 4)),
            "bn_recalibrate": dict(batches=[torch.ones(2, 1, 4, 4)]),
        },
    ),
}


def drawn(module):
    """With biases other than 0. (A bias over the patches has the derivative 0: a layer norm takes it out.)"""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


APPLIED = {
    "GroupLinear": (lambda: lnn.GroupLinear(2, 3, 4), (randn(3, 2, 3),), ()),
    "LocalMixerBlock": (
        lambda: drawn(lnn.LocalMixerBlock(4, 4, groups=1, patches=3, token_mixing=False, outputs=5)),
        (randn(2, 3, 4),),
        (),
    ),
    "LocalMixer": (
        lambda: drawn(lnn.LocalMixer("S/2/2", image_size=4, in_channels=1, num_classes=3, blocks=1, width=8)),
        (randn(2, 1, 4, 4),),
        (),
    ),
}
