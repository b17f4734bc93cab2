"""Local losses in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

Kernels in triton_maps.py and triton_rows.py, what composes them in composed.py, block sizes in tiles.py. Half
inputs are widened on load, everything is computed in float32 and rounded once on store; sums have a fixed order. CPU
tensors work under TRITON_INTERPRET=1.
"""

from functools import partial

import torch

from ...core.tiles import power_of_two
from ..common.launch import block_count, configuration, launch, new
from . import composed, reference, triton_maps, triton_rows
from .reference import local_cross_entropy_grads  # noqa: F401  products and scalings of small matrices
from .tiles import TILES


def _map(op, shape, tensor):
    """`(configuration, programs over the planes, whether the channels are last)` of a pass over `shape`."""
    planes, positions, channels = shape
    channels_last = channels > 1
    config = configuration(TILES[op], (positions, channels if channels_last else planes, channels_last), tensor)
    blocks = (
        planes // channels * block_count(channels, config["BLOCK_C"])
        if channels_last
        else block_count(planes, config["BLOCK_C"])
    )
    return config, blocks, channels_last


def _slices(positions, blocks, config):
    """Parts of a plane, of eight tiles at least, where the planes alone are too few programs for the card."""
    return max(1, min(block_count(positions, 8 * config["BLOCK_P"]), block_count(1024, blocks), 64))


def _mean(h):
    dense, shape = composed.planes(h)
    mean = new(h, len(h), h.shape[1] if h.dim() == 4 else h.shape[2])
    config, blocks, channels_last = _map("sums", shape, dense)
    launch(
        triton_maps.sums_kernel,
        blocks,
        h.device,
        dense,
        mean,
        *shape,
        1,
        1 / shape[1],
        SQUARES=False,
        CHANNELS_LAST=channels_last,
        **config,
    )
    return mean


def _deviation(x):
    dense, shape = composed.planes(x)
    mean, deviation = new(x, *x.shape[:2]), new(x, *x.shape[:2])
    config, blocks, channels_last = _map("deviation", shape, dense)
    launch(
        triton_maps.deviation_kernel,
        blocks,
        x.device,
        dense,
        mean,
        deviation,
        *shape,
        CHANNELS_LAST=channels_last,
        **config,
    )
    return mean, deviation


def _scale(dense, shape, mean, factor, scale, like):
    """(dense - mean) * factor * scale, laid out as torch.empty_like(like)."""
    result, out = torch.empty_like(dense), torch.empty_like(like)
    if result.stride() == out.stride():
        result = out
    if dense.numel():
        config, blocks, channels_last = _map("scale", shape, dense)
        slices = _slices(shape[1], blocks, config)
        launch(
            triton_maps.scale_kernel,
            blocks * slices,
            like.device,
            dense,
            mean,
            factor.contiguous(),
            scale,
            result,
            *shape,
            slices,
            CHANNELS_LAST=channels_last,
            **config,
        )
    return out if result is out else out.copy_(result)


def _rows(rows, tensor):
    """`(configuration, programs)` of a pass over the rows of a matrix."""
    config = configuration(TILES["rows"], rows, tensor)
    return config, block_count(rows[0], config["BLOCK_B"])


# -- pool, linear, cross entropy ----------------------------------------------------------------------------------


def _cross_entropy_rows(logits, target, label_smoothing, grad_scale, compute_grad):
    losses = new(logits, len(logits))
    config, programs = _rows(logits.shape, logits)
    launch(
        triton_rows.cross_entropy_kernel,
        programs,
        logits.device,
        logits,
        target,
        losses,
        *logits.shape,
        float(label_smoothing),
        float(grad_scale),
        GRAD=compute_grad,
        **config,
    )
    return losses


local_cross_entropy = partial(composed.local_cross_entropy, _mean, _cross_entropy_rows)


# -- Forward-Forward ----------------------------------------------------------------------------------------------


def goodness(h, is_positive, threshold, mean, compute_grad):
    if h.numel() == 0:
        return reference.goodness(h, is_positive, threshold, mean, compute_grad)
    dense, shape = composed.samples(h)
    batch, size, _ = shape
    config, blocks, _ = _map("sums", shape, dense)
    slices = _slices(size, blocks, config)
    parts, loss, squares = new(h, slices, batch), new(h), new(h, batch)
    kappa = new(h, batch) if compute_grad else None
    launch(
        triton_maps.sums_kernel,
        blocks * slices,
        h.device,
        dense,
        parts,
        *shape,
        slices,
        1.0,
        SQUARES=True,
        CHANNELS_LAST=False,
        **config,
    )
    launch(
        triton_rows.goodness_kernel,
        1,
        h.device,
        parts,
        is_positive.contiguous().view(torch.uint8),
        squares,
        kappa,
        loss,
        batch,
        slices,
        float(threshold),
        1 / size if mean else 1.0,
        SLICES=power_of_two(slices),
        BLOCK_B=max(2048 // power_of_two(slices), 16),
    )
    return loss, new(h, 0) if kappa is None else kappa, squares


def goodness_grad(h, kappa, scale):
    return _scale(*composed.samples(h), None, kappa, scale, h)


# -- similarity matching ------------------------------------------------------------------------------------------


def _normalize_rows(features):
    rows, norms = new(features, *features.shape), new(features, len(features))
    config, programs = _rows(features.shape, rows)
    launch(triton_rows.normalize_kernel, programs, features.device, features, rows, norms, *features.shape, **config)
    return rows, norms


def _match_rows(products, target, same, other):
    losses = new(products, len(products))
    config, programs = _rows(products.shape, products)
    launch(
        triton_rows.match_kernel,
        programs,
        products.device,
        products,
        target,
        losses,
        *products.shape,
        same,
        other,
        **config,
    )
    return losses


def _rows_grad(factor, grad, rows, norms, deviation, mean, positions):
    out = torch.empty_like(rows)
    config, programs = _rows(rows.shape, rows)
    launch(
        triton_rows.rows_grad_kernel,
        programs,
        rows.device,
        grad.contiguous(),
        rows,
        norms,
        deviation,
        mean,
        out,
        *rows.shape,
        positions,
        float(factor),
        **config,
    )
    return out


similarity = partial(composed.similarity, _deviation, _normalize_rows, _match_rows, _rows_grad)


def similarity_grad(x, grad, mean, scale):
    if mean.numel() == 0:
        return reference.similarity_grad(x, grad, mean, scale)
    dense, shape = composed.planes(x)
    return _scale(dense, shape, mean.contiguous(), grad, scale, x)
