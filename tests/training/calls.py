"""Valid arguments of the trainers and of what cuts and plans models; no function in lgkernels.functional is theirs."""

import torch
from torch import nn

from lgkernels.nn import ClassifierBlock
from lgkernels.optim import OffsetSGD
from lgkernels.training import BlockwiseTrainer
from tests.support.calls import Call


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def loss_of_weight(x):
    return sum(p.mean() for p in OFFSETS.param_groups[0]["params"]) * x.mean()


CALLS: dict[str, Call] = {}
BLOCKS = dict(blocks=[nn.Linear(4, 3), nn.Linear(3, 2)], optimizer_factory=sgd)
CHAIN = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
OFFSETS = OffsetSGD([nn.Parameter(torch.ones(3))], lr=0.1)
TRAINER = BlockwiseTrainer([ClassifierBlock(nn.Linear(4, 3))], lambda parameters: OffsetSGD(parameters, 0.1))
MODULES = {
    "BackpropTrainer": Call(BLOCKS),
    "BlockwiseTrainer": Call(BLOCKS),
    "DirectTrainer": Call(BLOCKS, any_sign=("seed",)),
    "auxiliary_nets": Call(dict(units=[nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])),
    "split_blocks": Call(dict(model=CHAIN, units=2, input=torch.ones(2, 4))),
    "plan": Call(dict(model=CHAIN, input=(2, 4), units=(1, 2))),
    "refresh_trainer": Call(dict(trainer=TRAINER, data=(torch.ones(4, 4), torch.tensor([0, 1, 2, 0])))),
    "refresh_offsets": Call(
        dict(optimizers=[OFFSETS], bp_closure=loss_of_weight, local_closure=None, data=torch.ones(4))
    ),
}
