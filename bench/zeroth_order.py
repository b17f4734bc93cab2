"""A two-sided zeroth-order step of a linear layer, beside the usual way and two plain forwards."""

from functools import cached_property

import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from lgkernels.random import RandomFeedback

from .common import Case, Contestant, Problem

EPS, RATE = 1e-3, 1e-8  # a rate that leaves the weights as they are, for the next round


class Step(Problem):
    """`batch`: rows of x on each side; `rule`: the law of the noise."""

    op = "zeroth_order_step"
    registered_op = "perturbed_linear"
    title = "A two-sided zeroth-order step of a linear layer: both perturbed forwards, and the update"
    baseline = "two forwards"

    def __init__(self, case, device):
        super().__init__(case, device)
        self.bytes = 2 * self.footprint
        self.flops = 4 * case.batch * case.channels * case.out_channels

    @property
    def footprint(self):
        return self.case.channels * self.case.out_channels * torch.finfo(self.case.torch_dtype).bits // 8

    @cached_property
    def weight(self):
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(self.case.out_channels, self.case.channels, generator=generator)
        return (weight / self.case.channels**0.5).to(self.device, self.case.torch_dtype)

    @cached_property
    def noise(self):
        return RandomFeedback(1, law=self.case.rule).to(self.device)

    def contestants(self):
        return [
            *self.ours(self.library),
            Contestant("torch.normal over the weights, three times", "eager", self.usual),
            Contestant("two forwards", "floor", self.forwards),
        ]

    def library(self, impl):
        x = self.input.expand(2, *self.shape).contiguous()
        sides = torch.tensor([EPS, -EPS], device=self.device)

        def run():
            y = LF.perturbed_linear(x, self.weight, noise=self.noise, coefficients=sides, impl=impl)
            LF.formula_update_(self.weight, self.noise, RATE, impl=impl)
            return {"y": y}

        return run

    def usual(self):
        """The weights are moved there, across, and back with the step, by noise from a seed that is drawn anew."""
        weight, x = self.weight, self.input
        generator = torch.Generator(self.device)

        def move(by):
            generator.manual_seed(1)
            weight.add_(torch.normal(0.0, 1.0, weight.shape, generator=generator, device=self.device), alpha=by)

        def run():
            move(EPS)
            up = F.linear(x, weight)
            move(-2 * EPS)
            down = F.linear(x, weight)
            move(EPS - RATE)
            return {"sides": torch.stack((up, down))}

        return run

    def forwards(self):
        return lambda: {"sides": torch.stack([F.linear(self.input, self.weight) for _ in range(2)])}

    def truth(self):
        x = self.input.expand(2, *self.shape).double()
        z = self.noise.materialize(self.weight.shape, dtype=torch.float64)
        return {"y": torch.stack([F.linear(x[m], self.weight.double() + c * z) for m, c in enumerate((EPS, -EPS))])}


class Layer(Step):
    """Both perturbed forwards of another layer: no update, which is the linear layer's."""

    def contestants(self):
        return [
            *self.ours(self.library),
            Contestant("torch.normal, a perturbed copy for each side", "eager", self.usual),
            Contestant("two forwards", "floor", self.forwards),
        ]

    def plain(self, x, weight):
        raise NotImplementedError

    def perturbed(self, x, **options):
        raise NotImplementedError

    def sides_of(self, weights, x):
        return torch.stack([self.plain(x, weight) for weight in weights])

    def library(self, impl):
        x = self.input.expand(2, *self.input.shape).contiguous()
        sides = torch.tensor([EPS, -EPS], device=self.device)
        return lambda: {"y": self.perturbed(x, noise=self.noise, coefficients=sides, impl=impl)}

    def usual(self):
        generator = torch.Generator(self.device)

        def run():
            generator.manual_seed(1)
            z = torch.normal(0.0, 1.0, self.weight.shape, generator=generator, device=self.device)
            return {"sides": self.sides_of((torch.add(self.weight, z, alpha=c) for c in (EPS, -EPS)), self.input)}

        return run

    def forwards(self):
        return lambda: {"sides": self.sides_of((self.weight, self.weight), self.input)}

    def truth(self):
        z, weight = self.noise.materialize(self.weight.shape, dtype=torch.float64), self.weight.double()
        x = self.input.double() if self.input.is_floating_point() else self.input
        return {"y": self.sides_of((weight + c * z for c in (EPS, -EPS)), x)}


class Conv(Layer):
    """3x3, padding 1."""

    op = "zeroth_order_conv2d"
    registered_op = "perturbed_conv2d"
    title = "Both perturbed forwards of a 3x3 convolution"

    @property
    def footprint(self):
        return 9 * super().footprint

    @cached_property
    def weight(self):
        shape = self.case.out_channels, self.case.channels, 3, 3
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) / (9 * self.case.channels) ** 0.5
        return weight.to(self.device, self.case.torch_dtype)

    def plain(self, x, weight):
        return F.conv2d(x, weight, padding=1)

    def perturbed(self, x, **options):
        return LF.perturbed_conv2d(x, self.weight, padding=1, **options)


class Embedding(Layer):
    """`batch` rows of a table of `channels` rows are looked up."""

    op = "zeroth_order_embedding"
    registered_op = "perturbed_rows"
    title = "Both perturbed forwards of an embedding"

    @cached_property
    def weight(self):
        weight = torch.randn(self.case.channels, self.case.out_channels, generator=torch.Generator().manual_seed(3))
        return weight.to(self.device, self.case.torch_dtype)

    @cached_property
    def input(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.case.channels, (self.case.batch,), generator=generator).to(self.device)

    def plain(self, x, weight):
        return F.embedding(x, weight)

    def perturbed(self, x, **options):
        return LF.perturbed_embedding(x, self.weight, **options)


def _step(rows, law="sign", size=2048, **more):
    return Case(Step, rows, size, size, rule=law, **more)


CASES = {
    "smoke": [
        *(_step(3, size=40), _step(3, "normal", size=40)),
        *(Case(Conv, 3, 8, 5, 6, rule="sign"), Case(Embedding, 3, 20, 8, rule="sign")),
    ],
    "cpu": [_step(8), _step(64), _step(512), _step(8, "uniform8"), _step(8, "normal"), _step(512, "normal")]
    + [Case(Conv, 8, 256, 256, 14, rule="sign"), Case(Embedding, 512, 50257, 768, rule="sign")],
    "gpu": [_step(rows, law, 4096, dtype="bfloat16") for rows in (16, 2048) for law in ("sign", "normal")]
    + [Case(Conv, 64, 512, 512, 14, rule="sign"), Case(Embedding, 8192, 50257, 768, rule="sign")],
}
