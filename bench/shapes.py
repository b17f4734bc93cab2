"""What is measured: cases by preset. `smoke` is tiny (CI), `cpu` and `gpu` hold the shapes of the README's tables."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One comparison. `op` names the builder in `providers.py`; the other fields are read by it."""

    op: str
    batch: int
    channels: int = 0  # input channels of a block, features of a 2-D activation
    out_channels: int = 0
    size: int = 0  # height and width
    pool: int = 1
    classes: int = 10
    modulation: str = None
    max_pool: bool = False
    dtype: str = "float32"
    channels_last: bool = False
    rule: str = None  # of the feedback cases

    @property
    def name(self):
        shape = [self.batch, self.channels, self.out_channels, self.size]
        parts = ["x".join(str(n) for n in shape if n)]
        parts += [self.rule] if self.rule else [f"pool{self.pool}", f"{self.classes}classes"]
        parts += [self.modulation] if self.modulation else []
        parts += ["maxpool"] if self.max_pool else []
        parts += [self.dtype] + (["channels_last"] if self.channels_last else [])
        return "-".join([self.op, *parts])

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


def block(batch, channels, out_channels, size, pool, classes, **more):
    return Case("lls_block", batch, channels, out_channels, size, pool, classes, **more)


def feedback(op, rules, batch, channels, out_channels=0, size=0, **more):
    return [Case(f"feedback_{op}", batch, channels, out_channels, size, rule=rule, **more) for rule in rules.split()]


def local(op, batch, channels, size=0, **more):
    return Case(f"local_{op}", batch, channels, size=size, **more)


_HALF = dict(dtype="bfloat16", channels_last=True)

PRESETS = {
    "smoke": [
        Case("lls_loss", 8, 40, pool=40, classes=12),
        Case("lls_loss", 4, 6, size=8, pool=2, modulation="matrix"),
        block(4, 3, 8, 8, 4, 10),
        Case("norm_act_pool", 4, 8, size=8, pool=2, max_pool=True),
        Case("grad_preactivation_", 4, 8, size=8, pool=2),
        Case("vgg8_step", 4, 3, size=16),
        *feedback("linear", "usf frsf brsf fa", 3, 40, 24),
        *feedback("conv2d", "usf brsf", 2, 4, 6, 5),
        *feedback("product", "usf brsf fa", 3, 40, 24),
        *feedback("step", "usf", 3, 40, 24),
        Case("dfa_step", 2, 3, size=16, rule="dfa"),
        local("cross_entropy", 3, 6, 5, classes=7),
        local("goodness", 4, 6, 5),
        local("similarity", 4, 6, 5),
        Case("offset_step", 1, rule="small"),
        Case("lokr_linear", 3, 24, 36, rule="rank 1"),
    ],
    "cpu": [
        Case("lls_loss", 128, 1024, pool=1024, classes=100),
        Case("lls_loss", 128, 1024, pool=1024, classes=100, modulation="matrix"),
        Case("lls_loss", 32, 128, size=32, pool=4),
        block(16, 64, 128, 32, 4, 10),
        block(16, 128, 256, 32, 2, 10),
        block(32, 256, 512, 8, 2, 100),
        block(32, 512, 512, 4, 2, 100),
        Case("norm_act_pool", 64, 256, size=32, pool=2),
        Case("grad_preactivation_", 64, 256, size=32, pool=2),
        Case("vgg8_step", 32, 3, size=32),
        Case("vgg8_step", 32, 3, size=32, channels_last=True),
        *feedback("linear", "usf frsf brsf fa", 8, 9216, 4096),
        *feedback("linear", "usf brsf", 128, 9216, 4096),
        *feedback("linear", "usf brsf", 512, 768, 3072),
        *feedback("conv2d", "usf brsf", 2, 512, 512, 7),
        *feedback("product", "usf brsf fa", 8, 9216, 4096),
        *feedback("product", "usf brsf", 128, 9216, 4096),
        *feedback("product", "usf brsf", 512, 768, 3072),
        *feedback("step", "usf", 8, 9216, 4096),
        Case("dfa_step", 32, 3, size=32, rule="dfa"),
        local("cross_entropy", 64, 256, 56, classes=100),
        local("cross_entropy", 64, 256, 56, classes=100, channels_last=True),
        local("goodness", 64, 256, 56),
        local("similarity", 64, 256, 56, classes=100),
        Case("offset_step", 1, rule="ResNet-50"),
        Case("lokr_linear", 512, 768, 3072, rule="rank 1"),
    ],
    "gpu": [
        Case("norm_act_pool", 128, 256, size=32, pool=2, **_HALF),
        Case("norm_act_pool", 128, 256, size=32, pool=2, max_pool=True, **_HALF),
        Case("grad_preactivation_", 128, 256, size=32, pool=2, **_HALF),
        Case("lls_loss", 128, 1024, pool=1024, classes=100),
        Case("lls_loss", 128, 128, size=32, pool=4, dtype="bfloat16", channels_last=True),
        block(128, 128, 256, 32, 2, 10, max_pool=True, **_HALF),
        block(128, 256, 512, 8, 2, 100, **_HALF),
        Case("vgg8_step", 128, 3, size=32, **_HALF),
        *feedback("linear", "usf brsf fa", 8, 9216, 4096),
        *feedback("linear", "usf brsf", 64, 9216, 4096, dtype="bfloat16"),
        *feedback("linear", "usf brsf", 4096, 9216, 4096, dtype="bfloat16"),
        *feedback("product", "usf brsf fa", 8, 9216, 4096, dtype="bfloat16"),
        *feedback("step", "usf", 8, 9216, 4096),
        local("cross_entropy", 64, 256, 56, classes=100, **_HALF),
        local("goodness", 64, 256, 56, **_HALF),
        local("similarity", 64, 256, 56, classes=100, **_HALF),
        Case("offset_step", 1, rule="ResNet-50"),
    ],
}
