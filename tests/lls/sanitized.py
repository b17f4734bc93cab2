"""Every kernel of the family on small odd shapes, without the library's, for support/sanitized.py."""

import itertools

import torch

from tests.lls.problems import areas, head_arguments, modulation, norm_arguments, table
from tests.support.problems import preactivation, randn, targets

IMAGES = [(3, 5, 7, 7, 2), (2, 16, 8, 8, 2), (1, 3, 1, 1, 2), (2, 9, 5, 33, 4)]  # overlapping, exact, repeated bins
HEADS = [(5, 33, 10), (3, 300, 40), (2, 40, 300)]  # (samples, latents, classes)


def run(kernels, device):
    """Calls every function for each layout, dtype and mode; returns its results."""

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
        loss, grad, s, grad_logits = kernels.head(x, target, m, phi, *head_arguments(classes))
        results += [loss, grad, s, grad_logits]
        if m is not None:
            results.append(kernels.modulation_grad(s, grad_logits, kind == "vector", one))
        if kernels.CAPABILITIES.finishes_head:
            losses, *_ = kernels.head(x, target, m, phi, *head_arguments(classes), reduce=False)
            finish = losses, target, s, grad_logits, m, -100
            latents = randn(batch, 3 * 4).to(device)
            results += kernels.norm_grads(latents, latents, latents, 3, torch.ones(4, device=device), finish)
            z, norm = randn(batch, 17).to(device), place(*norm_arguments(17))
            results += kernels.linear_grad_preactivation_(z, *norm, 0.01, torch.ones_like(z), 17, 1.0, finish)
    return results
