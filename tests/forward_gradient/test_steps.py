"""Whole LG-FG-A steps of the authors (tests/golden/local_fg), and the exact local gradient."""

import pytest
import torch

from lgkernels.training import ForwardGradientTrainer
from tests.forward_gradient.common import STEPS, load, network, noise, stages

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def close(name, got, expected, scale=None, condition=1.0):
    scale = (expected if scale is None else scale).abs().max().double()
    error = (got.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[got.dtype] * condition * scale, f"{name}: {error:.2e} of {scale:.2e}"


def condition_of(data):
    """What a layer norm makes of the relative rounding of its input z, which is stored: max |z| / the least standard
    deviation. Here 4 channels may lie near each other; plain back-propagation in float32 is as far off."""
    z = [value for key, value in data.items() if "prenorm" in key]
    deviations = [v.std(1 if v.shape[1:] == (int(data["D"]), int(data["P"])) else -1, correction=0).min() for v in z]
    return max(float(v.abs().max() / d) for v, d in zip(z, deviations))


def trainer_of(model, estimator, **options):
    return ForwardGradientTrainer(
        model, lambda p: torch.optim.SGD(p, 0.1), estimator=estimator, readout_factor=1.0, **options
    )


def check(data, model, gradients, prefix):
    names = {parameter: name for name, parameter in model.named_parameters()}
    exact = next(iter(gradients.values())).dtype == torch.float64
    condition = 1.0 if exact else condition_of(data)
    for i, (_, module) in enumerate(stages(model)):
        weight = data[f"{prefix}_p{i}_w"]
        close(f"weight {i}", gradients[names[module.weight]], weight.mT, condition=condition)
        # where a bias's gradient is 0 in theory, the weight's is the measure
        bias = data[f"{prefix}_p{i}_b"]
        scale = torch.maximum(bias.abs().max(), weight.abs().max())
        close(f"bias {i}", gradients[names[module.bias]], bias, scale, condition)
    for i, head in enumerate([*(block.head for block in model.blocks), model.readout]):
        close(f"head {i}", gradients[names[head.weight]], data[f"grad_h{i}_w"].mT, condition=condition)
        close(f"head's bias {i}", gradients[names[head.bias]], data[f"grad_h{i}_b"], condition=condition)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("estimator, prefix", [("LG-FG-A", "fga"), ("LG-BP", "lgbp")])
def test_step(name, dtype, estimator, prefix):
    data = load(name)
    model = network(data, dtype)
    trainer = trainer_of(model, estimator)
    given = noise(data, model, dtype) if estimator == "LG-FG-A" else None
    losses, gradients = trainer.gradients(data["x"].to(dtype), data["labels"], noise=given)
    check(data, model, gradients, prefix)
    for b in range(len(model.blocks)):
        close(f"loss {b}", losses[b] * len(data["x"]), data[f"loss_b{b}"][:, 0, 0].sum() * len(data["x"]))
