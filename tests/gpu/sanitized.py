"""Every kernel of a backend on small odd shapes, without the library's: what test_sanitizers.py runs under a checker.

`python -m tests.gpu.sanitized triton|cuda`
"""

import functools
import itertools
import sys

import torch

from tests.conftest import backend_module
from tests.ops.lls_problems import HEAD, areas, modulation, norm_arguments, preactivation, randn, table, targets

IMAGES = [(3, 5, 7, 7, 2), (2, 16, 8, 8, 2), (1, 3, 1, 1, 2), (2, 9, 5, 33, 4)]  # overlapping, exact, repeated bins
HEADS = [(5, 33, 10), (3, 300, 40), (2, 40, 300)]  # (samples, latents, classes)


def run(kernels, device):
    """Calls every function for each layout, dtype and mode; returns (finite results, results)."""

    def place(*tensors):
        return [t if t is None else t.to(device) for t in tensors]

    results, one = [], torch.ones((), device=device)
    layouts = itertools.product(IMAGES, ("dense", "channels_last"), (torch.float32, torch.bfloat16))
    for (*shape, pool), layout, dtype in layouts:
        channels = shape[1]
        z, bias, mean, var = place(preactivation(shape, dtype, layout), *(randn(channels, seed=i) for i in range(3)))
        norm = [*kernels.batch_stats(z, bias, mean, var, 0.1, 1e-5), *place(*norm_arguments(channels)[2:])]
        out, x, s1, s2 = kernels.norm_act_pool(z, *norm, 0.01, pool, min(shape[2:]) > 1, True)
        grads = kernels.norm_grads(x, s1, s2, channels, *place(areas(*shape[2:], pool)))
        results += [out, kernels.latents(z, pool), *grads]
        results.append(kernels.expand_grad(x, one, torch.empty_like(z), pool))
        results.append(kernels.grad_preactivation_(z, *norm, 0.01, x, *grads[:2], pool, 1.0))
    for features, pool in ((33, 33), (40, 16), (17, 65)):
        z = randn(5, features).to(device)
        norm = [*kernels.batch_stats(z, None, None, None, 0.1, 1e-5), *place(*norm_arguments(features)[2:])]
        out, x, *_ = kernels.norm_act_pool(z, *norm, 0.01, pool, False, True)
        results += [out, *kernels.linear_grad_preactivation_(z, *norm, 0.01, x, pool, 1.0), z]
        results.append(kernels.expand_grad(x, one, torch.empty_like(z), pool))
    for (batch, dim, classes), kind, waveform in itertools.product(
        HEADS, ("none", "vector", "matrix"), ("square", "cosine")
    ):
        x, target, m, phi = place(
            randn(batch, dim),
            targets(batch, classes),
            modulation(kind, classes, classes),
            table(kernels, waveform, classes, dim),
        )
        loss, grad, s, grad_logits = kernels.head(x, target, m, phi, num_classes=classes, **HEAD)
        results += [loss, grad, s, grad_logits]
        if m is not None:
            results.append(kernels.modulation_grad(s, grad_logits, kind == "vector", one))
        if hasattr(kernels, "FINISHES_HEAD"):
            losses, *_ = kernels.head(x, target, m, phi, num_classes=classes, reduce=False, **HEAD)
            finish = losses, target, s, grad_logits, m, -100
            latents = randn(batch, 3 * 4).to(device)
            results += kernels.norm_grads(latents, latents, latents, 3, torch.ones(4, device=device), finish)
            z, norm = randn(batch, 17).to(device), place(*norm_arguments(17))
            results += kernels.linear_grad_preactivation_(z, *norm, 0.01, torch.ones_like(z), 17, 1.0, finish)
    return sum(bool(t.isfinite().all()) for t in results), len(results)


def run_feedback(kernels, device):
    """The same of the family feedback."""
    results, state = [], torch.tensor([5, 6, 7], device=device)
    index = torch.tensor([2, 0, 2, 5], device=device)
    for (rows, columns), dtype in itertools.product(((3, 1), (33, 70), (65, 300)), (torch.float32, torch.bfloat16)):
        weight, grad, x, buffer = (
            randn(*shape, seed=i).to(device, dtype)
            for i, shape in enumerate(((rows, columns), (9, rows), (9, columns), (rows, columns)))
        )
        packed = kernels.pack_signs(weight)
        for signs, law in itertools.product((weight, packed, None), (None, "uniform", "normal", "uniform8", "sign")):
            random = None if law is None else (state, law, 0.7, None)
            formula = signs, None, random, 0.5, signs is packed
            results.append(kernels.matrix((rows, columns), *formula, dtype, torch.device(device)))
            results.append(kernels.product(grad, columns, *formula))
            if law is not None:
                results.append(kernels.rows(index, columns, random, 0.5, dtype))
        for velocity, nesterov, manhattan in ((None, False, False), (buffer, True, False), (buffer, False, True)):
            kernels.sgd_update_(weight, velocity, grad, x, 0.1, 0.9, 0.0, 0.01, nesterov, manhattan, 1.0)
        results += [weight, buffer]
    return sum(bool(t.isfinite().all()) for t in results), len(results)


def run_local(kernels, update, device):
    """The same for the local losses and the offset step."""
    results, one = [], torch.ones((), device=device)
    for shape, layout, dtype in itertools.product(
        [(3, 5, 7, 7), (2, 16, 8, 8), (1, 72, 9, 8), (2, 4, 40, 70)],
        ("dense", "channels_last"),
        (torch.float32, torch.bfloat16),
    ):
        h, target = preactivation(shape, dtype, layout).to(device), targets(shape[0], 300).to(device)
        results += kernels.local_cross_entropy(h, randn(300, shape[1]).to(device), None, target, 0.1, "mean", True)
        loss, kappa, squares = kernels.goodness(h, target > 5, 2.0, True, True)
        results += [loss, kappa, squares, kernels.goodness_grad(h, kappa, one)]
        loss, grad, mean = kernels.similarity(h, target, 300, True, True)
        results += [loss, grad, mean, kernels.similarity_grad(h, grad, mean, one)]
    results += kernels.similarity(randn(3, 1500).to(device), targets(3, 10).to(device), 10, True, True)[:2]
    lists = [[randn(n, seed=i).to(device) for n in (8193, 7, 16, *[5] * 75)] for i in range(4)]
    lists[3][:2] = lists[3][0].bfloat16(), None
    update.step_(*lists, 0.1, 0.9, 0.01, 1.0, 0.5)
    results += lists[0] + lists[2]
    return sum(bool(t.isfinite().all()) for t in results), len(results)


if __name__ == "__main__":
    backend = functools.partial(backend_module, name=sys.argv[1])
    outcomes = [
        run(backend("lls"), "cuda"),
        run_feedback(backend("feedback"), "cuda"),
        run_local(backend("local_loss"), backend("offset"), "cuda"),
    ]
    finite, count = map(sum, zip(*outcomes))
    torch.cuda.synchronize()
    print(f"{finite} of {count} finite")
    sys.exit(finite != count)
