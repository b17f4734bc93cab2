"""Adapters: LoKr and LoRA around a frozen linear layer, beside LyCORIS and PEFT where they are installed."""

import importlib.util
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.core import optional

from .common import Case, Contestant, Problem

ALPHA = 4.0


def installed(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


class _Adapter(Problem):
    baseline = "frozen nn.Linear"
    differentiable = True
    names: dict[str, str]  # of the factors: ours and, by PEFT's and LyCORIS' names, theirs

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
        """None of them zero."""
        adapted = self.adapter(self.layer, rank=self.rank, alpha=ALPHA)
        torch.manual_seed(4)
        for factor in adapted.parameters(recurse=False):
            nn.init.normal_(factor, std=0.1)
        return [getattr(adapted, name) for name in self.names]

    @cached_property
    def grad(self):
        return self.incoming(self.case.batch, self.case.out_channels)

    def contestants(self):
        return [
            *self.ours(lambda impl: lambda: self.adapted(self.input, *self.factors, impl)),
            Contestant("frozen nn.Linear", "floor", self.frozen),
            Contestant("eager", "eager", self.eager),
            *([Contestant("LyCORIS", "peer", self.lycoris)] if installed("lycoris") else []),
            *([Contestant("PEFT", "peer", self.peft)] if installed("peft", "transformers") else []),
        ]

    def gradients(self, y, inputs, grad):
        keys = "y", "grad_x", *(f"grad_{name}" for name in self.names)
        return dict(zip(keys, (y.detach(), *torch.autograd.grad(y, inputs, grad))))

    def adapted(self, x, *rest):
        *factors, impl = rest
        weight, bias, grad = (t.to(x.dtype) for t in (self.layer.weight, self.layer.bias, self.grad))
        return self.gradients(self.call(x, weight, bias, factors, impl), [x, *factors], grad)

    def frozen(self):
        x, grad = self.input, self.grad
        _ = self.factors  # freezes the layer
        return lambda: {"": torch.autograd.grad(self.layer(x), [x], grad)[0]}

    def eager(self):
        x, factors, layer = self.input, self.factors, self.layer

        def run():
            y = F.linear(x, layer.weight + self.scale * self.change(*factors), layer.bias)
            return self.gradients(y, [x, *factors], self.grad)

        return run

    def host(self):
        host = nn.Linear(self.case.channels, self.case.out_channels).to(self.device, self.case.torch_dtype)
        host.load_state_dict(self.layer.state_dict())
        return host.requires_grad_(False)

    def timed(self, layer, parameters, which):
        """A peer's layer with our factors; `which`: the place of their names."""
        own = dict(parameters)
        factors = [own[names[which]] for names in self.names.values()]
        with torch.no_grad():
            for factor, value in zip(factors, self.factors):
                factor.copy_(value)
        x, grad = self.input, self.grad
        return lambda: self.gradients(layer(x), [x, *factors], grad)

    def lycoris(self):
        """4.1.3."""
        host = self.host()
        module = self.lycoris_module()("peer", host, 1.0, self.rank, ALPHA).to(self.device, self.case.torch_dtype)
        module.apply_to()
        return self.timed(host, module.named_parameters(), 1)

    def peft(self):
        """0.21.2."""
        try:
            optional.torchvision()  # which transformers imports where it is there
        except ImportError:
            pass
        import peft

        model = peft.get_peft_model(nn.Sequential(self.host()), self.peft_config(peft), autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        return self.timed(layer, layer.named_parameters(), 0)

    def truth(self):
        doubles = [t.detach().double().requires_grad_() for t in (self.input, *self.factors)]
        return self.adapted(*doubles, "reference")


class LoKrLinear(_Adapter):
    op = registered_op = "lokr_linear"
    title = "LoKr adapter around a frozen linear layer, forward and backward"
    adapter, rank, scale = lnn.LoKrLinear, 1, ALPHA
    names = {w: (f"lokr_{w}.default", f"lokr_{w}") for w in ("w1", "w2_a", "w2_b")}

    def call(self, x, weight, bias, factors, impl):
        w1, a, b = factors
        return LF.lokr_linear(x, weight, bias, w1=w1, w2=(a, b), scale=self.scale, impl=impl)

    @staticmethod
    def change(w1, a, b):
        return torch.kron(w1, a @ b)

    def lycoris_module(self):
        from lycoris.modules.lokr import LokrModule

        return LokrModule

    def peft_config(self, peft):
        return peft.LoKrConfig(r=self.rank, alpha=ALPHA, target_modules=["0"])


class LoRALinear(_Adapter):
    op = registered_op = "lora_linear"
    title = "LoRA adapter around a frozen linear layer, forward and backward"
    adapter, rank, scale = lnn.LoRALinear, 8, ALPHA / 8
    names = {"a": ("lora_A.default.weight", "lora_down.weight"), "b": ("lora_B.default.weight", "lora_up.weight")}

    def call(self, x, weight, bias, factors, impl):
        a, b = factors
        return LF.lora_linear(x, weight, bias, a=a, b=b, scale=self.scale, impl=impl)

    @staticmethod
    def change(a, b):
        return b @ a

    def lycoris_module(self):
        from lycoris.modules.locon import LoConModule

        return LoConModule

    def peft_config(self, peft):
        return peft.LoraConfig(r=self.rank, lora_alpha=ALPHA, target_modules=["0"])


CASES = {
    "smoke": [Case(LoKrLinear, 3, 24, 36, rule="rank 1"), Case(LoRALinear, 3, 24, 36, rule="rank 8")],
    "cpu": [Case(LoKrLinear, 512, 768, 3072, rule="rank 1"), Case(LoRALinear, 512, 768, 3072, rule="rank 8")],
    "gpu": [Case(LoKrLinear, 4096, 768, 3072, rule="rank 1"), Case(LoRALinear, 4096, 768, 3072, rule="rank 8")],
}
