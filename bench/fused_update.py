"""A linear layer's forward, backward and AdamW step, with the step fused into its weight gradient, or after it.

A step has to read the weight twice, for y and dX, and to read and write weight, exp_avg and exp_avg_sq once: 32 bytes a
weight in float32. The usual step writes the gradient and reads it again (8 more, and the pages of a new one).
"""

import math
import os
from functools import cached_property, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import fuse_update

from .common import Case, Contestant, Problem


class Step(Problem):
    """The learning rate is 0, so that any step can be compared with the first."""

    op = "fused_update_step"
    title = "Linear layer: forward, backward and AdamW"
    baseline = "nn.Linear, AdamW(fused=True)"
    registered_op = "fused_update_"
    differentiable = True

    def __init__(self, case, device):
        super().__init__(case, device)
        weights, size = case.channels * case.out_channels, torch.finfo(case.torch_dtype).bits // 8
        self.memory = self.input_bytes + 3 * weights * size
        self.bytes = 8 * weights * size

    @property
    def footprint(self):
        return self.memory

    def layer(self):
        layer = nn.Linear(self.case.channels, self.case.out_channels)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(self.case.channels))
        return layer.to(self.device, self.case.torch_dtype)

    @cached_property
    def grad(self):
        return self.incoming(self.case.batch, self.case.out_channels)

    def contestants(self):
        ours = self.ours(self.fused, reference=False)
        return [
            *(Contestant(f"{c.name}, fuse_update", c.role, c.make, backend=c.backend) for c in ours),
            *(
                Contestant(f"{c.name}, 8-bit states", c.role, c.make, variant=True, backend=c.backend)
                for c in self.ours(partial(self.fused, state_bits=8), reference=False)
            ),
            Contestant(self.baseline, "bp", lambda: self.plain(fused=True)),
            Contestant("nn.Linear, AdamW(foreach=True)", "bp", lambda: self.plain(foreach=True)),
            Contestant("nn.Linear, AdamW(fused=True) in backward hooks", "peer", self.hooks),
            Contestant("floor", "floor", self.floor),
        ]

    def step(self, layer, step):
        x, grad = self.input, self.grad

        def run():
            x.grad = None
            layer(x).backward(grad)
            step()
            return {"grad_x": x.grad}

        return run

    def plain(self, **options):
        layer = self.layer()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, **options)

        def step():
            optimizer.step()
            optimizer.zero_grad()

        return self.step(layer, step)

    def fused(self, impl, state_bits=32):
        layer = self.layer()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, fused=True)
        fuse_update(layer, optimizer, include=[""], state_bits=state_bits)

        def step():
            with mock.patch.dict(os.environ, LGKERNELS_IMPL=impl):
                optimizer.step()
            optimizer.zero_grad()

        return self.step(layer, step)

    def hooks(self):
        """torch's way to hold one gradient at a time: an optimizer for each parameter, stepped when it is there."""
        layer = self.layer()
        optimizers = {p: torch.optim.AdamW([p], lr=0.0, fused=True) for p in layer.parameters()}

        def hook(p):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in layer.parameters():
            p.register_post_accumulate_grad_hook(hook)
        return self.step(layer, lambda: None)

    def floor(self):
        """The products with the weight, and the weight and both states read and written once."""
        weight = self.layer().weight.detach()
        x, grad = self.input.detach(), self.grad
        own = weight, torch.zeros_like(weight), torch.zeros_like(weight)

        def run():
            F.linear(x, weight)
            grad @ weight
            for tensor in own:
                tensor.mul_(1.0)

        return run

    def truth(self):
        return {"grad_x": self.grad.double() @ self.layer().weight.detach().double()}


CASES = {
    "smoke": [Case(Step, 3, 40, 24)],
    "cpu": [
        Case(Step, 8, 9216, 4096),
        Case(Step, 64, 9216, 4096),
        Case(Step, 512, 768, 3072),
        Case(Step, 2048, 768, 3072),
    ],
    "gpu": [Case(Step, 8, 9216, 4096), Case(Step, 4096, 4096, 4096, dtype="bfloat16"), Case(Step, 512, 768, 3072)],
}
