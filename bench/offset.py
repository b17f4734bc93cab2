"""The step of SGD with momentum and an offset, over all parameters of a network."""

import math
from functools import cached_property, partial

import torch
from torch import nn

from lgkernels.optim import OffsetSGD

from .common import Case, Contestant, Problem


def resnet50_shapes():
    """Of the 161 parameters of torchvision's ResNet-50."""

    def norm(width):
        return [(width,), (width,)]

    shapes, width = [(64, 3, 7, 7), *norm(64)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        wide = 4 * planes
        for i in range(blocks):
            shapes += [(planes, width, 1, 1), *norm(planes), (planes, planes, 3, 3), *norm(planes)]
            shapes += [(wide, planes, 1, 1), *norm(wide)]
            if i == 0:
                shapes += [(wide, width, 1, 1), *norm(wide)]
            width = wide
    return [*shapes, (1000, 2048), (1000,)]


SHAPES = {"ResNet-50": resnet50_shapes(), "small": [(5, 3), (7,), (2, 3, 5, 4)]}


class OffsetStep(Problem):
    """A learning rate of 0, so that any step can be compared with the first; the momentum of gradients that never
    change has its fixed point in the buffers from the start."""

    op = "offset_step"
    registered_op = "offset_sgd_"
    title = "SGD with momentum and an offset, one step over all parameters"
    baseline = "add, SGD fused"
    tolerance = 2e-2
    options = dict(lr=0.0, momentum=0.9)

    def __init__(self, case, device):
        super().__init__(case, device)
        self.shapes = SHAPES[case.rule]
        self.count = sum(math.prod(s) for s in self.shapes)
        self.bytes = 24 * self.count

    @property
    def footprint(self):
        return 16 * self.count

    @cached_property
    def tensors(self):
        """Values, gradients and offsets."""
        generator = torch.Generator().manual_seed(0)
        return [[torch.randn(s, generator=generator).to(self.device) for s in self.shapes] for _ in range(3)]

    def parameters(self):
        values, grads, _ = self.tensors
        made = [nn.Parameter(v.clone()) for v in values]
        for p, g in zip(made, grads):
            p.grad = g.clone()
        return made

    def contestants(self):
        ours = self.ours(self.library, reference=False)
        best = "cpu" if "cpu" in [c.backend for c in ours] else ours[-1].backend
        half = partial(self.library, best, torch.bfloat16)
        return [
            *ours,
            Contestant(f"lgkernels {best}, bfloat16 offsets", "ours", half, variant=True),
            Contestant("add, SGD foreach", "eager", lambda: self.rival(foreach=True)),
            Contestant("add, SGD fused", "peer", lambda: self.rival(fused=True)),
            Contestant("floor", "floor", self.floor),
        ]

    def library(self, impl, dtype=None):
        made, (_, grads, offsets) = self.parameters(), self.tensors
        buffers = [torch.zeros_like(p) for p in made]
        offsets = [o.clone() if dtype is None else o.to(dtype) for o in offsets]
        optimizer = OffsetSGD(made, offset_dtype=dtype, **self.options)
        for p, buffer, offset in zip(made, buffers, offsets):
            optimizer.state[p].update(momentum_buffer=buffer, offset=offset)
        with torch.no_grad():
            torch._foreach_copy_(buffers, [10 * (g + o) for g, o in zip(grads, offsets)])
        of_the_op = 0.0, 0.9, 0.0, 1.0, 1.0, 1.0, impl

        @torch.no_grad()
        def step():
            if impl == "cpu":  # what a user calls
                optimizer.step()
            else:
                params, own = [p.data for p in made], [p.grad for p in made]
                torch.ops.lgkernels.offset_sgd_(params, own, buffers, offsets, *of_the_op)
            return {"momentum": buffers[0]}

        return step

    def rival(self, **how):
        made, (_, grads, offsets) = self.parameters(), self.tensors
        optimizer = torch.optim.SGD(made, **self.options, **how)
        for p, g, o in zip(made, grads, offsets):
            optimizer.state[p]["momentum_buffer"] = 10 * (g + o)
        first = [None]

        def step():
            torch._foreach_add_([p.grad for p in made], offsets)
            optimizer.step()
            first[0] = optimizer.state[made[0]]["momentum_buffer"].clone() if first[0] is None else first[0]
            return {"momentum": first[0]}

        return step

    def floor(self):
        """As the step: 16 bytes a parameter read, 8 written in place."""
        source, out = (torch.zeros(2 * self.count, device=self.device) for _ in range(2))
        return lambda: {"": out.add_(source)}

    def truth(self):
        _, grads, offsets = self.tensors
        return {"momentum": 10 * (grads[0] + offsets[0]).double()}


CASES = {
    "smoke": [Case(OffsetStep, 1, rule="small")],
    "cpu": [Case(OffsetStep, 1, rule="ResNet-50")],
    "gpu": [Case(OffsetStep, 1, rule="ResNet-50")],
}
