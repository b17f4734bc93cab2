"""Valid calls of the family's public functions."""

import torch

from tests.support.calls import Call

_MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
MODULES = {"fuse_update": Call(dict(model=_MODEL, optimizer=torch.optim.SGD(_MODEL.parameters(), 0.1), min_weights=1))}
