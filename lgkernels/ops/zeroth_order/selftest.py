"""Tiny cases of the family's ops for `python -m lgkernels info --selftest`: `CASES[op](impl, device, dtype)`."""

import torch

from ..common.selftest import ROWS, Ordinary, arranged, values
from . import op  # noqa: F401  registers the ops

_ops = torch.ops.lgkernels


def _noise(device, law, members):
    states = torch.tensor([[5, 3, step] for step in range(members)], device=device, dtype=torch.int64)
    return None, states, law, 1.0, None


def linear(impl, device, dtype, sizes=(2, 3, 20, 150), layout="contiguous", law="sign"):
    members, rows, outputs, inputs = sizes
    given = dict(device=device, dtype=dtype)
    x, weight = values(members, rows, inputs, **given), arranged(values(outputs, inputs, scale=0.1, **given), layout)
    coefficients = torch.tensor([0.25, -0.25] * members, device=device, dtype=torch.float32)[:members]
    bias = values(outputs, **given)
    return [_ops.perturbed_linear(x, weight, bias, coefficients, *_noise(device, law, 1), impl)]


def convolution(impl, device, dtype, sizes=(2, 2, 20, 30, 6), layout="contiguous", law="sign"):
    members, batch, outputs, inputs, size = sizes
    given = dict(device=device, dtype=dtype)
    x = values(members * batch, inputs, size, size, **given)
    weight = arranged(values(outputs, inputs // 2, 3, 3, scale=0.1, **given), layout)
    coefficients = torch.tensor([0.25, -0.25] * members, device=device, dtype=torch.float32)[:members]
    geometry = [1, 1], [1, 1], [1, 1], 2
    x, bias = x.unflatten(0, (members, batch)), values(outputs, **given)
    return [_ops.perturbed_conv2d(x, weight, bias, coefficients, *_noise(device, law, 1), *geometry, impl)]


def rows(impl, device, dtype, sizes=(2, 9, 20, 150), layout="contiguous", law="uniform8"):
    members, count, outputs, inputs = sizes
    weight = arranged(values(outputs, inputs, device=device, dtype=dtype), layout)
    x = (torch.arange(members * count, device=device) * 7 % outputs).view(members, count)
    coefficients = torch.tensor([0.25, -0.25] * members, device=device, dtype=torch.float32)[:members]
    return [_ops.perturbed_rows(weight, x, coefficients, *_noise(device, law, 1), True, impl)]


def update(impl, device, dtype, sizes=(20, 150), layout="contiguous", law="uniform8"):
    weight = arranged(values(*sizes, device=device, dtype=dtype), layout)
    coefficients = torch.tensor([0.25, -0.125, 0.5], device=device, dtype=torch.float32)
    _ops.formula_update_(weight, coefficients, *_noise(device, law, 3), 0.5, impl)
    return [weight]


def _case(function, sizes, *law):
    return lambda impl, device, dtype, layout: function(impl, device, dtype, sizes, layout, *law)


CASES = {"perturbed_linear": linear, "perturbed_conv2d": convolution, "perturbed_rows": rows, "formula_update_": update}
ORDINARY = {
    "perturbed_linear": {
        "8 rows a side": Ordinary(ROWS, _case(linear, (2, 8, 512, 768))),
        "128 rows a side": Ordinary(ROWS, _case(linear, (2, 128, 512, 768))),
        "normal noise": Ordinary(ROWS, _case(linear, (2, 8, 512, 768), "normal")),
    },
    "perturbed_conv2d": {"16 samples a side": Ordinary(("contiguous",), _case(convolution, (2, 16, 256, 256, 14)))},
    "perturbed_rows": {
        "512 tokens a side": Ordinary(ROWS, _case(rows, (2, 512, 5000, 768))),
        "normal noise": Ordinary(ROWS, _case(rows, (2, 64, 500, 768), "normal")),
    },
    "formula_update_": {
        "three members": Ordinary(ROWS, _case(update, (512, 768))),
        "signs": Ordinary(ROWS, _case(update, (512, 768), "sign")),
    },
}
