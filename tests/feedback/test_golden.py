"""The authors' own numbers through every backend: BioTorch's and willwx's layers (tests/golden/signsym), and
ChFrenkel's networks under FA, DFA, sDFA and DRTP (tests/golden/feedback)."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
import lgkernels.nn as lnn
from tests.support.tolerances import GOLDEN, assert_relative

FOLDER = Path(__file__).parents[1] / "golden"
LAYERS = sorted(p.stem for p in (FOLDER / "signsym").glob("*.npz"))
NETWORKS = sorted(p.stem for p in (FOLDER / "feedback").glob("*.npz"))
SIGNED_INIT = "feedback_alignment_signed_init"


@cache
def load(folder, name):
    with np.load(FOLDER / folder / f"{name}.npz", allow_pickle=False) as file:
        return {k: file[k].item() if file[k].ndim == 0 else file[k] for k in file.files}


pytestmark = pytest.mark.only(where=lambda backend, precision: precision == "float32" or backend == "reference")


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    return getattr(torch, request.param)


def tolerance(precision):
    return {torch.float32: GOLDEN["float32_gradient"], torch.float64: GOLDEN["float64"]}.get(
        precision, GOLDEN["half_gradient"]
    )


def test_every_file_is_here():
    assert len(LAYERS) == 29 and len(NETWORKS) == 4


# -- layers -----------------------------------------------------------------------------------------------------


def feedback_arguments(data, tensor):
    """The function's name and its feedback arguments."""
    rule = data["rule"]
    if rule in ("usf", "sign_symmetry"):
        return "sign_symmetric", {"scale": float(data["scale"])}
    if rule in ("frsf", "sign_symmetry_random_magnitude"):
        return "sign_symmetric", {"magnitude": tensor("M")}
    if rule == SIGNED_INIT:
        return "feedback", {"feedback": float(data["scale"]) * tensor("W_init").sign()}
    assert rule in ("fa", "feedback_alignment"), rule
    return "feedback", {"feedback": tensor("M")}


def run_layer(name, impl, dtype, channels_last=False):
    data = load("signsym", name)

    def tensor(key):
        if key not in data:
            return None
        value = torch.from_numpy(data[key]).to(dtype)
        return value.contiguous(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value

    x, weight, bias = (None if t is None else t.requires_grad_() for t in map(tensor, ("x", "W", "b")))
    family, arguments = feedback_arguments(data, tensor)
    if data["kind"] == "conv":
        geometry = tuple(data[key] for key in ("stride", "padding", "dilation", "groups"))
        y = getattr(LF, f"{family}_conv2d")(x, weight, bias, *geometry, **arguments, impl=impl)
    else:
        y = getattr(LF, f"{family}_linear")(x, weight, bias, **arguments, impl=impl)
    y.backward(tensor("grad_output"))
    got = {"y": y, "dX": x.grad, "dW": weight.grad, "db": None if bias is None else bias.grad}
    return data, {key: value for key, value in got.items() if value is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, impl, precision):
    data, got = run_layer(name, impl, precision)
    for key, value in got.items():
        assert_relative(key, value, data[key], tolerance(precision))


@pytest.mark.parametrize("name", [n for n in LAYERS if "conv" in n and "willwx" not in n])
def test_channels_last(name, impl):
    data, got = run_layer(name, impl, torch.float32, channels_last=True)
    for key, value in got.items():
        assert_relative(key, value, data[key], tolerance(torch.float32))


@pytest.mark.parametrize("name", [n for n in LAYERS if "nobias" not in n])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_in_half_precision(name, impl, dtype):
    data, got = run_layer(name, impl, dtype)
    for key, value in got.items():
        assert value.dtype == dtype
        assert_relative(key, value, data[key], tolerance(dtype))


SCALES = {
    "biotorch": lambda data: "xavier" if data["init"] == "xavier" else "kaiming",
    "willwx": lambda data: "he_fan_out" if data["kind"] == "conv" else "inv_sqrt_fan_in",
}


@pytest.mark.parametrize("name", [n for n in LAYERS if "scale" in load("signsym", n)])
def test_named_scales(name):
    """The origins' constants, by name (README of the golden files)."""
    data = load("signsym", name)
    scale = SCALES[name.split("_")[0]](data)
    assert abs(lnn.feedback.scale_of(scale, data["W"].shape) - data["scale"]) <= 1e-15


# -- networks ---------------------------------------------------------------------------------------------------

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda z: z}
LOSSES = {"BCE": F.binary_cross_entropy, "MSE": F.mse_loss}


class Network:
    """One stored network in plain torch, its hidden layers open to a rule."""

    def __init__(self, name, dtype, impl):
        self.data, self.dtype, self.impl = load("feedback", name), dtype, impl
        self.count = sum(key.startswith("kind/") for key in self.data)
        self.weights = [
            (self.get(f"W/{i}").requires_grad_(), self.get(f"b/{i}").requires_grad_()) for i in range(self.count)
        ]

    def get(self, key):
        return torch.from_numpy(self.data[key]).to(self.dtype)

    def is_conv(self, i):
        return str(self.data[f"kind/{i}"]).lower().startswith("conv")

    def layer(self, i, h, feedback=None):
        weight, bias = self.weights[i]
        if not self.is_conv(i):
            h = h.flatten(1)
            return (
                F.linear(h, weight, bias)
                if feedback is None
                else LF.feedback_linear(h, weight, bias, feedback=feedback, impl=self.impl)
            )
        geometry = int(self.data[f"stride/{i}"]), int(self.data[f"padding/{i}"])
        return (
            F.conv2d(h, weight, bias, *geometry)
            if feedback is None
            else LF.feedback_conv2d(h, weight, bias, *geometry, feedback=feedback, impl=self.impl)
        )

    def activation(self, i, z):
        last = i == self.count - 1
        kind = "output_act" if last else "conv_act" if self.is_conv(i) else "hidden_act"
        return ACTIVATIONS[str(self.data[kind])](z)

    def loss(self, output):
        if self.data["loss_fn"] == "CE":
            return F.cross_entropy(output, torch.from_numpy(self.data["labels"]))
        return LOSSES[str(self.data["loss_fn"])](output, self.get("targets"))

    def pool(self, i, h):
        return F.max_pool2d(h, 2) if self.is_conv(i) else h

    def hidden(self):
        """Hidden activations of separate graphs, as a direct rule sees them; then output and loss."""
        h, activations = self.get("x"), []
        for i in range(self.count - 1):
            activations.append(self.activation(i, self.layer(i, h)))
            h = self.pool(i, activations[-1]).detach()
        output = self.activation(self.count - 1, self.layer(self.count - 1, h))
        return activations, output, self.loss(output)

    def compare(self, rule, loss):
        assert abs(loss.item() - self.data["loss"]) <= GOLDEN["float32_loss"]
        for i, (weight, bias) in enumerate(self.weights):
            assert_relative(f"{rule} W/{i}", weight.grad, self.data[f"{rule}/grad_W/{i}"], tolerance(self.dtype))
            assert_relative(f"{rule} b/{i}", bias.grad, self.data[f"{rule}/grad_b/{i}"], tolerance(self.dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_network_fa(name, impl, precision):
    net = Network(name, precision, impl)
    h = net.get("x")
    for i in range(net.count):
        h = net.pool(i, net.activation(i, net.layer(i, h, net.get(f"B_fa/{i}"))))
    loss = net.loss(h)
    loss.backward()
    net.compare("FA", loss)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", ["DFA", "sDFA", "DRTP", "DRTP from class indices"])
def test_network_direct(name, rule, impl, precision):
    net = Network(name, precision, impl)
    activations, output, loss = net.hidden()
    loss.backward()
    labels, targets = torch.from_numpy(net.data["labels"]), net.get("targets")
    error = (output.softmax(1) if net.data["loss_fn"] == "CE" else output).detach() - targets
    for i, activation in enumerate(activations):
        feedback, shape = net.get(f"B_direct/{i}"), activation.shape[1:]
        if rule.startswith("DRTP"):
            signal = LF.target_projection(targets if rule == "DRTP" else labels, feedback, shape, impl=impl)
        else:
            signal = LF.feedback_projection(error.sign() if rule == "sDFA" else error, feedback, shape, impl=impl)
        assert signal.shape == activation.shape and not signal.requires_grad
        activation.backward(signal)
    net.compare(rule.split()[0], loss)
