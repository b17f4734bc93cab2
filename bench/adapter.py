"""Adapters: LoKr around a frozen linear layer."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn

from .common import Case, Contestant, Problem


def lycoris():
    """LyCORIS' module, or None where it isn't installed (`pip install lycoris-lora==4.1.3`)."""
    try:
        from lycoris.modules.lokr import LokrModule

        return LokrModule
    except ImportError:
        return None


class LoKrLinear(Problem):
    op = registered_op = "lokr_linear"
    title = "LoKr adapter around a frozen linear layer, forward and backward"
    baseline = "frozen nn.Linear"
    differentiable = True

    def __init__(self, case, device):
        super().__init__(case, device)
        self.flops = 4 * case.batch * case.out_channels * case.channels

    @property
    def footprint(self):
        return (
            self.input_bytes
            + self.case.channels * self.case.out_channels * torch.finfo(self.case.torch_dtype).bits // 8
        )

    @cached_property
    def layer(self):
        torch.manual_seed(3)
        return nn.Linear(self.case.channels, self.case.out_channels).to(self.device, self.case.torch_dtype)

    @cached_property
    def factors(self):
        """w1, w2_a, w2_b."""
        adapted = lnn.LoKrLinear(self.layer, rank=1, alpha=4.0)
        nn.init.normal_(adapted.w2_b)
        return [adapted.w1, adapted.w2_a, adapted.w2_b]

    @cached_property
    def grad(self):
        return self.incoming(self.case.batch, self.case.out_channels)

    def contestants(self):
        peer = [Contestant("LyCORIS", "peer", self.peer)] * (lycoris() is not None and self.device.type == "cpu")
        return [
            *self.ours(lambda impl: lambda: self.adapted(self.input, *self.factors, impl)),
            Contestant("frozen nn.Linear", "floor", self.frozen),
            Contestant("eager", "eager", self.eager),
            *peer,
        ]

    @staticmethod
    def gradients(y, inputs, grad):
        keys = "y", "grad_x", "grad_w1", "grad_a", "grad_b"
        return dict(zip(keys, (y.detach(), *torch.autograd.grad(y, inputs, grad))))

    def adapted(self, x, w1, a, b, impl):
        weight, bias, grad = (t.to(x.dtype) for t in (self.layer.weight, self.layer.bias, self.grad))
        y = LF.lokr_linear(x, weight, bias, w1=w1, w2=(a, b), scale=4.0, impl=impl)
        return self.gradients(y, [x, w1, a, b], grad)

    def frozen(self):
        x, grad = self.input, self.grad
        _ = self.factors  # freezes the layer
        return lambda: {"": self.gradients(self.layer(x), [x], grad)}

    def eager(self):
        x, (w1, a, b), layer = self.input, self.factors, self.layer

        def run():
            y = F.linear(x, layer.weight + 4.0 * torch.kron(w1, a @ b), layer.bias)
            return self.gradients(y, [x, w1, a, b], self.grad)

        return run

    def peer(self):
        host = nn.Linear(self.case.channels, self.case.out_channels)
        host.load_state_dict(self.layer.state_dict())
        host.requires_grad_(False)
        module = lycoris()("lokr", host, 1.0, 1, 4)
        module.apply_to()
        own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        factors = [own[name] for name in ("lokr_w1", "lokr_w2_a", "lokr_w2_b")]
        with torch.no_grad():
            for factor, value in zip(factors, self.factors):
                factor.copy_(value)
        x, grad = self.input, self.grad
        return lambda: self.gradients(host(x), [x, *factors], grad)

    def truth(self):
        doubles = [t.detach().double().requires_grad_() for t in (self.input, *self.factors)]
        return self.adapted(*doubles, "reference")


CASES = {
    "smoke": [Case(LoKrLinear, 3, 24, 36, rule="rank 1")],
    "cpu": [Case(LoKrLinear, 512, 768, 3072, rule="rank 1")],
}
