"""A tiny case of the family's op for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`."""

import torch

from ..common.selftest import ROWS, Ordinary
from . import op  # noqa: F401  registers the op

SMALL = ((3, 5), (), (70,))


def step(impl, device, dtype, shapes=SMALL):
    """Parameters are float32 (float64 for the truth); a half dtype is the offsets', bfloat16 at that."""
    generator = torch.Generator().manual_seed(1)
    wide, half = (dtype, dtype) if dtype == torch.float64 else (torch.float32, torch.bfloat16)

    def tensors(dtype):
        return [
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").bfloat16().to(device, dtype)
            for shape in shapes
        ]

    params, grads, buffers, offsets = (tensors(wide) for _ in range(4))
    offsets = [
        offsets[0].to(half) if dtype in (torch.bfloat16, torch.float16) else offsets[0],
        offsets[1].new_empty(0),
        offsets[2],
    ]
    torch.ops.lgkernels.offset_sgd_(params, grads, buffers, offsets, 0.1, 0.9, 0.01, 0.5, 2.0, 0.25, impl)
    return [*params, *buffers]


CASES = {"offset_sgd_": step}
_LAYERS = ((256, 128, 3, 3), (256,), (512, 1024))
ORDINARY = {
    "offset_sgd_": {
        "a convolution and a linear layer": Ordinary(
            ROWS[:1], lambda impl, device, dtype, layout: step(impl, device, dtype, _LAYERS)
        )
    }
}
