"""Valid calls of the family's public functions."""

import atexit
import shutil
import tempfile

from torch import nn

import lgkernels.nn as lnn
from tests.support.calls import Call
from tests.support.problems import randn

LINEAR = dict(x=randn(2, 6, seed=1), weight=randn(8, 6, seed=2), bias=randn(8, seed=3), scale=0.5)
CONV = dict(x=randn(2, 12, 5, 6, seed=1), weight=randn(8, 6, 3, 2, seed=2), bias=randn(8, seed=3), groups=2, scale=0.5)

CALLS = {
    "lora_linear": Call(dict(LINEAR, a=randn(3, 6), b=randn(8, 3)), free={"x": ...}, any_sign=("scale",)),
    "lokr_linear": Call(dict(LINEAR, w1=randn(2, 2), w2=randn(4, 3)), free={"x": ...}, any_sign=("scale",)),
    "lokr_conv2d": Call(
        dict(CONV, w1=randn(2, 2), w2=randn(4, 3, 3, 2)), free={"x": (0, 2, 3)}, dims={"x": (3,)}, any_sign=("scale",)
    ),
}


def _adapted():
    return lnn.adapt(nn.Sequential(nn.Linear(6, 8)), "lora", verbose=False)


def _file():
    """Of an adapter, by LyCORIS' keys."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lnn.save_adapter(_adapted(), f"{folder}/x.safetensors", convention="lycoris")
    return f"{folder}/x.safetensors"


FILE = _file()
MODULES = {
    "LoRAConv2d": Call(dict(base=nn.Conv2d(6, 8, 3)), any_sign=("alpha",)),
    "LoRALinear": Call(dict(base=nn.Linear(6, 8)), any_sign=("alpha",)),
    "LoKrLinear": Call(dict(base=nn.Linear(6, 8)), any_sign=("alpha", "factor")),
    "LoKrConv2d": Call(dict(base=nn.Conv2d(6, 8, 3)), any_sign=("alpha", "factor")),
    "adapt": Call(dict(model=nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))), any_sign=("alpha",)),
    "set_adapter": Call(dict(model=_adapted(), adapter_name="default", weights=0.5), any_sign=("weights",)),
    "disable_adapter": Call(dict(model=_adapted())),
    "load_adapter": Call(dict(model=nn.Sequential(nn.Linear(6, 8)), path=FILE)),
    "save_adapter": Call(dict(model=_adapted(), path=FILE, convention="lycoris")),
    "merge": Call(dict(model=nn.Linear(6, 8))),
    "unmerge": Call(dict(model=nn.Linear(6, 8))),
}
