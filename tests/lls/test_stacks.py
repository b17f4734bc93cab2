"""The trainer against the authors' code over several steps of a small network (golden/lls/stack_*.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lgkernels.nn as lnn
from lgkernels.training import BlockwiseTrainer

GOLDEN = Path(__file__).parents[1] / "golden" / "lls"
FILES = sorted(path.stem for path in GOLDEN.glob("stack_*.npz"))
MODULATION = {"LLS": None, "LLS_M": "vector", "LLS_MxM": "matrix", "LLS_MxM_reduced": "reduced"}
NAMES = ("layer1", "layer2", "layer3", "layer4", "classifier")


def tensors_of(block):
    """Golden name -> tensor of the block."""
    if isinstance(block, lnn.ClassifierBlock):
        return {"weight": block.module.weight, "bias": block.module.bias}
    found = {
        "weight": block.layer.weight,
        "bias": block.layer.bias,
        "bn_weight": block.norm.weight,
        "bn_bias": block.norm.bias,
        "running_mean": block.norm.running_mean,
        "running_var": block.norm.running_var,
    }
    return found if block.modulation is None else {**found, "M": block.modulation}


def network(golden, impl, dtype):
    """(modules, name -> block), loaded with the initial tensors."""
    classes = golden["init/classifier/weight"].shape[0]
    options = dict(
        num_classes=classes,
        modulation=MODULATION[str(golden["mode"])],
        waveform=str(golden["waveform"]),
        temperature=float(golden["temperature"]),
        label_smoothing=float(golden["label_smoothing"]),
        impl=impl,
    )
    pools = golden["pooling_sizes"].tolist()
    shapes = [golden[f"init/{name}/weight"].shape for name in NAMES]
    conv = [
        lnn.LLSConvBlock(shape[1], shape[0], 3, padding=1, pool_size=pool, max_pool=i < 2, **options)
        for i, (shape, pool) in enumerate(zip(shapes[:3], pools))
    ]
    linear = lnn.LLSLinearBlock(shapes[3][1], shapes[3][0], pool_size=pools[3], **options)
    blocks = [*conv, linear, lnn.ClassifierBlock(nn.Linear(shapes[4][1], classes))]
    for name, block in zip(NAMES, blocks):
        block.to(dtype)
        with torch.no_grad():
            for key, tensor in tensors_of(block).items():
                if f"init/{name}/{key}" in golden:
                    tensor.copy_(torch.from_numpy(golden[f"init/{name}/{key}"]))
    return [*conv, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *blocks[3:]], dict(zip(NAMES, blocks))


def optimizer_factory(golden):
    lr = float(golden["lr"])
    if str(golden["optimizer"]) == "AdamWSF":
        schedulefree = pytest.importorskip("schedulefree")
        return lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=lr)
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=float(golden["momentum"]))


def close(name, got, wanted, tolerance):
    wanted = torch.from_numpy(np.asarray(wanted)).double()
    error = (got.detach().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: {error:.2e} of the largest entry, allowed {tolerance}"


@pytest.mark.parametrize(
    "impl, dtype", [("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]
)
@pytest.mark.parametrize("file", FILES)
def test_stack(file, impl, dtype):
    golden = dict(np.load(GOLDEN / f"{file}.npz", allow_pickle=False))
    adam = str(golden["optimizer"]) == "AdamWSF"
    # the float64 vectors use the authors' own basis; sines may differ by a rounding on another machine
    exact = dtype == torch.float64 and str(golden["waveform"]) == "square"
    tolerance = (1e-9 if adam else 1e-10) if exact else 5e-5
    modules, blocks = network(golden, impl, dtype)
    trainer = BlockwiseTrainer(modules, optimizer_factory(golden))
    x, target = torch.from_numpy(golden["x"]).to(dtype), torch.from_numpy(golden["labels"])
    for k in range(1, int(golden["steps"]) + 1):
        losses = trainer.step(x, target)
        close(f"logits of step {k}", trainer.output, golden[f"step{k}/logits"], tolerance)
        close(f"losses of step {k}", losses, golden[f"step{k}/losses"], tolerance)
        for name, block in blocks.items():
            for key, tensor in tensors_of(block).items():
                if adam and key == "running_mean" and dtype == torch.float32:
                    continue  # follows the authors' block bias, whose rounding noise Adam amplifies
                if f"step{k}/{name}/{key}" in golden:
                    close(f"{name}.{key} after step {k}", tensor, golden[f"step{k}/{name}/{key}"], tolerance)
    trainer.eval()
    averaged = [key for key in golden if key.startswith("averaged/")]
    assert bool(averaged) == adam
    for key in averaged:
        _, name, tensor = key.split("/")
        close(key, tensors_of(blocks[name])[tensor], golden[key], tolerance)


def test_there_are_stacks():
    assert len(FILES) == 3
