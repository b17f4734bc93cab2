"""The authors' own numbers (tests/golden/local_loss): predsim, SupCon, NT-Xent and Forward-Forward."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lgkernels.functional as LF
from tests.support.tolerances import GOLDEN, assert_relative

FOLDER = Path(__file__).parents[1] / "golden" / "local_loss"
FILES = {
    kind: sorted(p.stem for p in FOLDER.glob(f"{kind}_*.npz"))
    for kind in ("predsim", "supcon", "ntxent", "ff_mean", "ff_sum", "lokr")
}


@cache
def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {k: file[k].item() if file[k].ndim == 0 else file[k] for k in file.files}


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    return getattr(torch, request.param)


def leaves(data, precision, *names):
    return [torch.from_numpy(np.array(data[n])).to(precision).requires_grad_() for n in names]


def tensor(data, name, precision=torch.float32):
    result = torch.from_numpy(np.array(data[name]))
    return result.to(precision) if result.is_floating_point() else result


def check_loss(name, got, expected, precision):
    tolerance = GOLDEN["float64"] if precision == torch.float64 else GOLDEN["float32_loss"]
    assert abs(got.item() - expected) <= tolerance * max(1, abs(expected)), f"{name}: {got.item()} {expected}"


def check(name, got, expected, precision):
    assert_relative(name, got, expected, GOLDEN["float64" if precision == torch.float64 else "float32_gradient"])


def test_every_file_is_here():
    assert {kind: len(names) for kind, names in FILES.items()} == {
        "predsim": 8,
        "supcon": 5,
        "ntxent": 3,
        "ff_mean": 2,
        "ff_sum": 2,
        "lokr": 8,
    }


@pytest.mark.parametrize("name", FILES["predsim"])
def test_predsim(name, precision):
    data = load(name)
    h, sim, decoder, bias = leaves(data, precision, "h", "sim_W", "decoder_W", "decoder_b")
    labels = tensor(data, "labels")
    options = dict(num_classes=data["n_classes"], use_std=data["use_std"])
    if data["kind"] == "conv":
        pool = dict(
            pool_kernel=tuple(map(int, data["pool_kernel"])), pool_padding=tuple(map(int, data["pool_padding"]))
        )
    else:
        pool = {}
    loss = LF.prediction_similarity_loss(h, labels, sim, decoder, bias, beta=data["beta"], **pool, **options)
    loss.backward()
    check_loss("loss", loss, data["loss"], precision)
    for key, leaf in (("h", h), ("sim_W", sim), ("decoder_W", decoder), ("decoder_b", bias)):
        check(key, leaf.grad, data[f"grad_{key}"], precision)
    similarity = LF.similarity_matching_loss(h.detach(), labels, sim.detach(), **options)
    check_loss("loss_sim", similarity * data["beta"], data["loss_sim_weighted"], precision)


@pytest.mark.parametrize("name", FILES["predsim"])
def test_predsim_block(name, precision):
    """Through the authors' whole block: the local gradient reaches the encoder and the batch norm."""
    data = load(name)
    x, labels = tensor(data, "x", precision), tensor(data, "labels")
    weight, bias, gamma, beta = leaves(data, precision, "encoder_W", "encoder_b", "bn_weight", "bn_bias")
    if data["kind"] == "conv":
        z = F.conv2d(x, weight, bias, data["stride"], data["padding"])
        pool = dict(
            pool_kernel=tuple(map(int, data["pool_kernel"])), pool_padding=tuple(map(int, data["pool_padding"]))
        )
    else:
        z, pool = F.linear(x, weight, bias), {}
    h = F.batch_norm(z, None, None, gamma, beta, True, eps=data["bn_eps"])
    h = F.relu(h) if data["nonlin"] == "relu" else F.leaky_relu(h, 0.01)
    LF.prediction_similarity_loss(
        h,
        labels,
        tensor(data, "sim_W", precision),
        tensor(data, "decoder_W", precision),
        tensor(data, "decoder_b", precision),
        num_classes=data["n_classes"],
        beta=data["beta"],
        use_std=data["use_std"],
        **pool,
    ).backward()
    for key, leaf in (("encoder_W", weight), ("bn_weight", gamma), ("bn_bias", beta)):
        check(key, leaf.grad, data[f"grad_{key}"], precision)


@pytest.mark.parametrize("name", [n for n in FILES["supcon"] if "auxhead" not in n])
def test_supcon(name, precision):
    data = load(name)
    (z,) = leaves(data, precision, "z")
    labels = tensor(data, "labels") if data["use_labels"] else None
    options = dict(
        temperature=data["temperature"], base_temperature=data["base_temperature"], contrast_mode=data["contrast_mode"]
    )
    loss = LF.supcon_loss(z, labels, **options)
    loss.backward()
    check_loss("loss", loss, data["loss"], precision)
    check("grad_z", z.grad, data["grad_z"], precision)
    features = F.normalize(z.detach(), dim=2).requires_grad_()
    LF.supcon_loss(features, labels, normalize=False, **options).backward()
    check("grad_features", features.grad, data["grad_features"], precision)


def test_supcon_head(precision):
    data = load("supcon_auxhead_0c2f")
    names = [k for k in data if k.startswith("head.")]
    x, *parameters = leaves(data, precision, "x", *names)
    head = dict(zip(names, parameters))
    z = x.mean((2, 3))
    z = F.relu(F.linear(z, head["head.2.weight"], head["head.2.bias"]))
    z = F.linear(z, head["head.4.weight"], head["head.4.bias"])
    loss = LF.supcon_loss(
        z, tensor(data, "labels"), temperature=data["temperature"], base_temperature=data["base_temperature"]
    )
    loss.backward()
    check_loss("loss", loss, data["loss"], precision)
    check("grad_x", x.grad, data["grad_x"], precision)
    for name, parameter in head.items():
        check(name, parameter.grad, data[f"grad_{name}"], precision)


@pytest.mark.parametrize("name", FILES["ntxent"])
def test_nt_xent(name, precision):
    data = load(name)
    z1, z2 = leaves(data, precision, "z1", "z2")
    loss = LF.nt_xent_loss(torch.cat([z1, z2]), temperature=data["temperature"])
    loss.backward()
    check_loss("loss", loss, data["loss"], precision)
    check("grad_z1", z1.grad, data["grad_z1"], precision)
    check("grad_z2", z2.grad, data["grad_z2"], precision)


@pytest.mark.parametrize("name", FILES["ff_mean"])
def test_forward_forward_mean(name, precision):
    """Overlay, three Adam steps, losses and gradients of every step."""
    data = load(name)
    x = tensor(data, "x", precision)
    inputs = [LF.overlay_label(x, tensor(data, key), num_classes=10) for key in ("labels", "labels_neg")]
    check("x_pos", inputs[0], data["x_pos"], precision)
    check("x_neg", inputs[1], data["x_neg"], precision)
    both = torch.cat(inputs)
    both = both / (both.norm(dim=1, keepdim=True) + data["norm_eps"])
    positive = torch.arange(len(both)) < len(x)
    weight, bias = leaves(data, precision, "W", "b")
    optimizer = torch.optim.Adam([weight, bias], data["adam_lr"])
    for step in (1, 2, 3):
        loss = LF.goodness_loss(F.relu(F.linear(both, weight, bias)), positive, threshold=data["threshold"])
        optimizer.zero_grad()
        loss.backward()
        check_loss("loss", loss, data[f"step{step}/loss"], precision)
        check("grad_W", weight.grad, data[f"step{step}/grad_W"], precision)
        check("grad_b", bias.grad, data[f"step{step}/grad_b"], precision)
        optimizer.step()
        # Adam divides by the root of rounded gradients: in float32 the weights drift apart
        drift = GOLDEN["float64"] if precision == torch.float64 else 1e-4
        assert_relative("W", weight, data[f"step{step}/W"], drift)
        assert_relative("b", bias, data[f"step{step}/b"], drift)


class _StraightThroughReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clamp_min(0)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("name", FILES["ff_sum"])
def test_forward_forward_sum(name, precision):
    data = load(name)
    layers = sum(key.startswith("W/") for key in data)
    weights, biases = (leaves(data, precision, *(f"{n}/{i}" for i in range(layers))) for n in "Wb")
    normalized = lambda t: t / (t.square().mean(1, keepdim=True).sqrt() + data["norm_eps"])  # noqa: E731
    x = torch.cat([tensor(data, "pos", precision), tensor(data, "neg", precision)])
    batch, peers = len(x) // 2, 0
    positive = torch.arange(2 * batch) < batch
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        h = _StraightThroughReLU.apply(F.linear(normalized(x), weight, bias))
        loss = LF.goodness_loss(h, positive, threshold=float(h.shape[1]), goodness="sum")
        check_loss(f"ff_loss/{i}", loss, data[f"ff_loss/{i}"], precision)
        peer, running = LF.peer_normalization_loss(
            h[:batch], tensor(data, f"running_mean_in/{i}", precision), momentum=data["peer_momentum"]
        )
        if data["peer_weight"]:
            check(f"running_mean_out/{i}", running, data[f"running_mean_out/{i}"], precision)
            peers = peers + peer.detach()
            loss = loss + data["peer_weight"] * peer
        loss.backward()
        check(f"W/{i}", weight.grad, data[f"grad_W/{i}"], precision)
        check(f"b/{i}", bias.grad, data[f"grad_b/{i}"], precision)
        x = h.detach()
    if data["peer_weight"]:
        check_loss("peer", peers, data["peer_loss_sum"], precision)
