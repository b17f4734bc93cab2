"""A small network of every kind of layer that has adapters, and factors that are not zero."""

import torch
from torch import nn

from tests.support.problems import randn


class Net(nn.Module):
    """With names of which one is another's end, and one that has an underscore where another has a dot."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.block = nn.ModuleDict({"fc_1": nn.Linear(8, 12), "fc": nn.Linear(12, 18)})
        self.norm = nn.LayerNorm(18)
        self.fc = nn.Linear(18, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        x = torch.tanh(self.block["fc_1"](x))
        return self.fc(self.norm(self.block["fc"](x)))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def images(dtype=torch.float32):
    return randn(3, 4, 6, 6, dtype=dtype)


def shake(model, seed=0):
    """All that learns gets new values."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(randn(*p.shape, seed=seed + i) * 0.3)
    return model


def factors(model):
    """By name, of all adapters."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "delta")}
    return {f"{n}.{k}": p for n, m in found.items() for k, p in m.named_parameters(recurse=False)}
