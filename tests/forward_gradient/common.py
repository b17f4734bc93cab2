"""The authors' vectors and their network."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

import lgkernels.nn as lnn

FOLDER = Path(__file__).parents[1] / "golden" / "local_fg"
STEPS = ("step_lgfga_bias1", "step_lgfga_mnistlike_bias1")


@cache
def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def network(data, dtype, double_bias=False):
    """The LocalMixer of a step file, with its weights: theirs are (in, out)."""
    side, channels = int(data["P"]) ** 0.5, {12: 3, 20: 5}[int(data["Din"])]
    model = lnn.LocalMixer(
        f"M/{int(side)}/{int(data['G'])}",
        image_size=2 * int(side),
        in_channels=channels,
        num_classes=int(data["K"]),
        blocks=int(data["NB"]),
        width=int(data["D"]),
        begin_norm=bool(data["pre_ln"]),
        middle_norm=bool(data["pre_ln"]),
        head_norm=bool(data["inter_ln"]),
        last_norm=bool(data["pre_ln"]),
        double_bias=double_bias,
        dtype=dtype,
    )
    with torch.no_grad():
        for i, (_, module) in enumerate(stages(model)):
            module.weight.copy_(data[f"p{i}_w"].mT)
            module.bias.copy_(data[f"p{i}_b"])
        for i, head in enumerate([*(block.head for block in model.blocks), model.readout]):
            head.weight.copy_(data[f"h{i}_w"].mT)
            head.bias.copy_(data[f"h{i}_b"])
    return model


def stages(model):
    return [stage for block in model.blocks for stage in block.stages()]


def noise(data, model, dtype):
    """Of each block and stage; theirs over patches is (N, D, P)."""
    result, i = [], 0
    for block in model.blocks:
        result.append([])
        for kind, _ in block.stages():
            u = data[f"noise{i}"].to(dtype)
            result[-1].append(u.mT.contiguous() if kind == "token" else u)
            i += 1
    return result
