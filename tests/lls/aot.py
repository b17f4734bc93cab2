"""Family lls for the ahead-of-time gate: cases that reach every row of its configuration tables."""

from functools import partial

import torch

from lgkernels.core.tiles import fitting
from lgkernels.ops.lls import basis, tiles
from lgkernels.ops.lls import triton as lls
from lgkernels.ops.lls.options import HeadOptions

MATRIX_KERNELS = {"similarity_kernel", "latent_grad_kernel", "logits_kernel", "grad_similarity_kernel"}
TABLES = {
    "similarity_kernel": (partial(fitting, tiles.SIMILARITY), ("BLOCK_M", "BLOCK_K", "BLOCK_D")),
    "latent_grad_kernel": (partial(fitting, tiles.LATENT_GRAD), ("BLOCK_M", "BLOCK_K", "BLOCK_D")),
    "logits_kernel": (partial(fitting, tiles.PRODUCT), ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    "grad_similarity_kernel": (partial(fitting, tiles.PRODUCT), ("BLOCK_M", "BLOCK_N", "BLOCK_K")),
    "modulation_grad_kernel": (partial(fitting, tiles.MODULATION_GRAD), ("BLOCK_B", "BLOCK_K", "BLOCK_C")),
}


def _convolution_block(shape, pool, dtype, channels_last, windows=(False, True)):
    z, channel = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
    z = z.contiguous(memory_format=torch.channels_last) if channels_last else z
    lls.batch_stats(z, None, channel, channel, 0.1, 1e-5)
    for max_pool in windows:
        lls.norm_act_pool(z, channel, channel, channel, channel, 0.01, pool, max_pool, True)
    latents = lls.latents(z, pool)
    lls.norm_grads(latents, latents, latents, shape[1], torch.empty(pool**2))
    lls.grad_preactivation_(z, channel, channel, channel, channel, 0.01, latents, channel, channel, pool, 1.0)
    lls.expand_grad(latents, torch.empty(()), z, pool)


def block_cases():
    """Both layouts, the dtypes, both windows, exact and overlapping bins, large and small maps; linear blocks."""
    for channels_last in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            _convolution_block((8, 256, 32, 32), 2, dtype, channels_last)
        _convolution_block((5, 9, 7, 7), 2, torch.bfloat16, channels_last)
        _convolution_block((8, 512, 4, 4), 2, torch.bfloat16, channels_last, windows=(False,))
    _convolution_block((4, 128, 32, 32), 4, torch.float16, True, windows=(False,))
    for shape, pool, dtype in (((128, 1024), 1024, torch.bfloat16), ((7, 40), 16, torch.float32)):
        z, column = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
        lls.batch_stats(z, column, column, column, 0.1, 1e-5)
        lls.norm_act_pool(z, column, column, column, column, 0.01, pool, False, True)
        latents = lls.latents(z, pool)
        lls.linear_grad_preactivation_(z, column, column, column, column, 0.01, latents, pool, 1.0)
        lls.expand_grad(latents, torch.empty(shape[0]), z, pool)


def head_cases():
    """Every mode of the head, and batch and class counts on both sides of each threshold of the tables."""
    options = HeadOptions(1, label_smoothing=0.1)
    column, area = torch.empty(256), torch.empty(4)
    for batch, dim, classes, modes in (
        (128, 2048, 10, (0, 1, 2)),
        (128, 1024, 20, (0, 2)),
        (16, 512, 100, (0, 1, 2)),
        (16, 256, 200, (0, 2)),
        (128, 2048, 100, (0, 1, 2)),
        (8192, 8192, 10, (0, 2)),
        (8192, 8192, 20, (2,)),
        (128, 8192, 1000, (0, 2)),
    ):
        x, target = torch.empty(batch, dim), torch.zeros(batch, dtype=torch.int64)
        for mode in modes:
            modulation = torch.empty((classes,) * mode) if mode else None
            losses, _, similarity, grad_logits = lls.head(
                x,
                target,
                modulation,
                basis.signs(classes, dim),
                options._replace(num_classes=classes),
                True,
                reduce=False,
            )
            finish = losses, target, similarity, grad_logits, modulation, -100
            latents, z = torch.empty(batch, 1024), torch.empty(batch, 256, dtype=torch.bfloat16)
            lls.norm_grads(latents, latents, latents, 256, area, finish)
            lls.linear_grad_preactivation_(z, *(column,) * 4, 0.01, torch.empty(batch, 256), 256, 1.0, finish)
            if mode:
                lls.modulation_grad(similarity, grad_logits, mode == 1, torch.empty(()))
        lls.head(x, target, None, torch.empty(classes, dim), options._replace(num_classes=classes), True)
    options = options._replace(num_classes=7)
    tess = dict(normalize=False, loss="hard_sigmoid_mse", reduction="none", zero_gradient_below_eps=True)
    x, target, phi = torch.empty(5, 33), torch.zeros(5, dtype=torch.int64), torch.empty(7, 33)
    lls.head(x, target, None, phi, options._replace(**tess), True)
    lls.head(x, target, None, phi, options, False)


def cases():
    block_cases()
    head_cases()
