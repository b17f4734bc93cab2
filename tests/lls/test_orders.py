"""Every LLS kernel gives the same bits whatever the order of threads and blocks, and meets the authors' numbers.

That the bits are right (all modes, dtypes, layouts, sizes) is tested in test_kernels.py, on the backend "cuda-simt".
"""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from lgkernels.ops.lls import basis
from tests.lls.problems import areas, head_arguments, modulation, norm_arguments, table
from tests.simt import executor
from tests.simt.orders import in_every_order as in_every_order_of
from tests.support.problems import preactivation, randn, targets
from tests.support.tolerances import GOLDEN, assert_relative

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))
FOLDER = Path(__file__).parents[1] / "golden" / "lls"
in_every_order = functools.partial(in_every_order_of, "lls")


# one case a code path: 16-byte vectors or not, bins that tile, overlap or repeat, several tiles and splits
IMAGES = [
    (2, 16, 8, 8, 2),
    (3, 5, 7, 7, 2),
    (2, 3, 9, 6, 4),
    (2, 4, 1, 1, 2),
    (1, 24, 32, 32, 2),
    (1, 2, 16, 80, 5),
    (5, 264, 2, 2, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_block_kernels(image, layout, dtype):
    *shape, pool = image
    channels = shape[1]
    z = preactivation(shape, dtype, layout)
    norm, latents = norm_arguments(channels), randn(shape[0], channels * pool**2, seed=5)
    bias, running = randn(channels, seed=6), (randn(channels, seed=7), randn(channels, seed=8).abs())

    def stats(kernels):
        moved = [t.clone() for t in running]
        return *kernels.batch_stats(z, bias, *moved, 0.1, 1e-5), *moved

    in_every_order(stats)
    in_every_order(lambda kernels: kernels.latents(z, pool))
    for max_pool in (False, True):
        in_every_order(lambda kernels: kernels.norm_act_pool(z, *norm, 0.01, pool, max_pool, True))
    _, _, s1, s2 = executor.backend("lls").norm_act_pool(z, *norm, 0.01, pool, False, True)
    dgamma, dbeta, _ = in_every_order(
        lambda kernels: kernels.norm_grads(latents, s1, s2, channels, areas(*shape[2:], pool))
    )
    in_every_order(
        lambda kernels: kernels.grad_preactivation_(z.clone(), *norm, 0.01, latents, dgamma, dbeta, pool, 4.0)
    )
    in_every_order(lambda kernels: kernels.expand_grad(latents, torch.tensor(0.7), torch.empty_like(z), pool))


@pytest.mark.parametrize("batch, features, pool", [(5, 40, 40), (3, 40, 16), (9, 24, 100)])
def test_linear_kernels(batch, features, pool):
    z, norm, latents = randn(batch, features), norm_arguments(features), randn(batch, pool, seed=5)
    in_every_order(lambda kernels: kernels.norm_act_pool(z, *norm, 0.01, pool, False, True))

    def grads(kernels):
        own = z.clone()
        return own, *kernels.linear_grad_preactivation_(own, *norm, 0.01, latents, pool, 2.0)

    in_every_order(grads)


# batch 1030: four samples a block, and blocks that take several; 4100 classes: the work does not fit into shared memory
@pytest.mark.parametrize("waveform", ["square", "cosine"])
@pytest.mark.parametrize(
    "batch, dim, rows, classes, kind, options",
    [
        (3, 70, 10, 10, "none", {}),
        (5, 33, 7, 17, "matrix", dict(label_smoothing=0.1)),
        (4, 300, 40, 40, "vector", dict(loss="hard_sigmoid_mse", reduction="none")),
        (1030, 20, 3, 3, "matrix", {}),
        (1, 12600, 2, 2, "none", dict(reduction="sum")),
        (2, 8, 4100, 4100, "vector", {}),
    ],
    ids=str,
)
def test_head(batch, dim, rows, classes, kind, options, waveform):
    x, target, m = randn(batch, dim), targets(batch, classes), modulation(kind, rows, classes)
    target[0] = -100 if batch > 1 else 0
    phi = table(executor.backend("lls"), waveform, rows, dim)
    loss, _, similarity, grad_logits = in_every_order(
        lambda kernels: kernels.head(x, target, m, phi, *head_arguments(classes, **options))
    )
    if kind != "none":
        in_every_order(
            lambda kernels: kernels.modulation_grad(
                similarity, grad_logits, kind == "vector", loss.new_ones(loss.shape)
            )
        )
    losses, latents, z = randn(batch, seed=4), randn(batch, 12), randn(batch, 17)
    finish = losses, target, similarity, grad_logits, m, -100
    in_every_order(lambda kernels: kernels.norm_grads(latents, latents, latents, 3, areas(4, 4, 2), finish))
    in_every_order(
        lambda kernels: kernels.linear_grad_preactivation_(z.clone(), *norm_arguments(17), 0.01, z, 17, 1.0, finish)
    )


def load(name):
    def value(array):
        return array.tolist() if array.ndim == 0 or array.dtype.kind == "U" else torch.from_numpy(array)

    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: value(file[key]) for key in file.files}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("head_*.npz")))
def test_golden_heads(name):
    data = load(name)
    activation, target, pool = data["a"].float(), data["labels"], data["pooling_size"]
    for config in data["configs"]:
        mode, waveform, temperature, smoothing = config.split("__")
        m = data[f"M/{mode}"].float() if f"M/{mode}" in data else None
        rows = m.shape[0] if m is not None and m.dim() == 2 else data["n_classes"]
        phi = data[f"Phi/{waveform}/K{rows}"]
        phi = basis.pack_signs(phi) if waveform == "square" else phi.float()
        options = dict(temperature=float(temperature[1:]), label_smoothing=float(smoothing[2:]))

        def run(kernels):
            x = kernels.latents(activation, pool)
            loss, grad, s, grad_z = kernels.head(x, target, m, phi, *head_arguments(data["n_classes"], **options))
            grad_a = kernels.expand_grad(grad, loss.new_ones(()), torch.empty_like(activation), pool)
            return (
                loss,
                grad_a,
                *([] if m is None else [kernels.modulation_grad(s, grad_z, m.dim() == 1, loss.new_ones(()))]),
            )

        loss, grad_a, *grad_m = in_every_order(run)
        assert abs(loss.item() - data[f"{config}/loss"]) <= GOLDEN["float32_loss"]
        assert_relative(f"{config} grad_a", grad_a, data[f"{config}/grad_a"], GOLDEN["float32_gradient"])
        for grad in grad_m:
            assert_relative(f"{config} grad_M", grad, data[f"{config}/grad_M"], GOLDEN["float32_gradient"])


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("block_*.npz")))
def test_golden_blocks(name):
    data = load(name)
    x, weight, target, pool = data["x"].float(), data["weight"].float(), data["labels"], data["pooling_size"]
    gamma, beta, slope = data["bn_weight"].float(), data["bn_bias"].float(), data["negative_slope"]
    conv = weight.dim() == 4
    m = data["M"].float() if "M" in data else None
    phi = basis.pack_signs(data["Phi"]) if data["waveform"] == "square" else data["Phi"].float()
    layer = (data["stride"], data["padding"]) if conv else ()

    def run(kernels):
        z = torch.conv2d(x, weight, None, *layer) if conv else x @ weight.t()
        running = [data[f"running_{key}_in"].float().clone() for key in ("mean", "var")]
        norm = *kernels.batch_stats(z, data["bias"].float(), *running, data["bn_momentum"], data["bn_eps"]), gamma, beta
        out, latents, s1, s2 = kernels.norm_act_pool(z, *norm, slope, pool, False, True)
        loss, grad, s, grad_z = kernels.head(
            latents,
            target,
            m,
            phi,
            *head_arguments(
                data["n_classes"], temperature=data["temperature"], label_smoothing=data["label_smoothing"]
            ),
        )
        if conv:
            dgamma, dbeta, _ = kernels.norm_grads(grad, s1, s2, z.shape[1], areas(*z.shape[2:], pool))
            kernels.grad_preactivation_(z, *norm, slope, grad, dgamma, dbeta, pool, 1.0)
            grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, z, *layer)
        else:
            dgamma, dbeta, _ = kernels.linear_grad_preactivation_(z, *norm, slope, grad, pool, 1.0)
            grad_weight = z.t() @ x
        extra = [] if m is None else [kernels.modulation_grad(s, grad_z, m.dim() == 1, loss.new_ones(()))]
        return out, loss, grad_weight, dgamma, dbeta, *running, *extra

    names = ["out", "loss", "grad_weight", "grad_bn_weight", "grad_bn_bias", "running_mean_out", "running_var_out"]
    for key, got in zip(names + ["grad_M"], in_every_order(run)):
        assert_relative(
            key, got, torch.as_tensor(data[key]), GOLDEN["float32_loss" if key == "loss" else "float32_gradient"]
        )
