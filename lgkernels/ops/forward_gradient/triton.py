"""Forward gradients in Triton: the functions of reference.py, same arguments, shapes and dtypes (no float64).

Kernels in triton_losses.py and triton_norm.py, block sizes in tiles.py. Half inputs are widened on load, everything
is computed in float32 and rounded once on store; sums have a fixed order. Products of matrices are the library's. CPU
tensors work under TRITON_INTERPRET=1.
"""

import math

import torch

from ..common.launch import block_count, configuration, launch, new
from ..common.philox import law_arguments, values_per_call
from . import reference, triton_losses, triton_norm
from .options import Noise, NormOptions
from .reference import EPS
from .tiles import TILES
from .torch import contrast  # noqa: F401  products of small matrices

# -- the replicated losses --------------------------------------------------------------------------------------------


def _plain(tensor, dtype=None):
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _step(size):
    """The largest of 8, 4, 2 and 1 that divides the contiguous size."""
    return math.gcd(size, 8)


def _stream(shape, tensor, op="stream"):
    """`(configuration, programs)` of a pass over (N, P, G, C)."""
    n, patches, groups, channels = shape
    config = configuration(TILES[op], (patches, groups, channels), tensor)
    return config, n * block_count(patches, config["BLOCK_P"]) * block_count(groups, config["BLOCK_G"])


def _normed_elsewhere(x):
    """Whether groups are too long for the tiles of the streams, so that LN_C and its derivative are passes of their
    own."""
    return _stream(x.shape, x)[0]["BLOCK_C"] < x.shape[3]


def _norm_options(x):
    return NormOptions(x.dim() - 1, EPS, False)


def _sum_patches(x, shape, slices, factor, layer_norm, config):
    n, patches, groups, channels = shape
    out = new(x, slices, n, groups * channels)
    programs = n * slices * block_count(groups, config["BLOCK_G"])
    launch(
        triton_losses.pooled_kernel,
        programs,
        x.device,
        x,
        out,
        patches,
        groups,
        channels,
        slices,
        factor,
        NORM=layer_norm,
        STEP=_step(channels if layer_norm else groups),
        **config,
    )
    return out


def pooled(x, layer_norm):
    if not x.numel():
        return reference.pooled(x, layer_norm)
    if layer_norm and _normed_elsewhere(x):
        x, layer_norm = dual_norm(x.float(), None, None, Noise(), _norm_options(x))[0], False
    n, patches, groups, channels = x.shape
    shape = x.shape if layer_norm else (n, patches, groups * channels, 1)
    config, _ = _stream(shape, x, "pool" if layer_norm else "stream")
    programs, tiles = n * block_count(shape[2], config["BLOCK_G"]), block_count(patches, config["BLOCK_P"])
    # parts of the patches, of eight tiles at least, where samples and channels are too few programs for the card
    slices = max(1, min(block_count(tiles, 8), block_count(1024, programs), 64))
    out = _sum_patches(_plain(x), shape, slices, 1 / patches, layer_norm, config)
    if slices > 1:
        shape = 1, slices, out[0].numel(), 1
        out = _sum_patches(out, shape, 1, 1.0, False, _stream(shape, out)[0])
    return out.view(n, groups * channels)


def classify(pooled, weight, bias, target):
    if not pooled.numel() or not weight.numel():
        return reference.classify(pooled, weight, bias, target)
    weight = weight.float()
    logits = pooled @ weight if bias is None else torch.addmm(bias.float(), pooled, weight)
    losses = new(logits, len(logits))
    config = configuration(TILES["rows"], logits.shape, logits)
    programs = block_count(len(logits), config["BLOCK_B"])
    launch(triton_losses.softmax_kernel, programs, logits.device, logits, target, losses, *logits.shape, **config)
    return losses, logits, logits @ weight.t()


def tangent(x, x_tangent, teach, head_tangent, out):
    if not out.numel() or not x_tangent.numel():
        return reference.tangent(x, x_tangent, teach, head_tangent, out)
    if x is not None and _normed_elsewhere(x):
        x_tangent = dual_norm(x.float(), x_tangent, None, Noise(), _norm_options(x))[1]
        x = None
    config, programs = _stream(x_tangent.shape, x_tangent)
    launch(
        triton_losses.tangent_kernel,
        programs,
        out.device,
        _plain(x),
        _plain(x_tangent),
        _plain(teach, torch.float32),
        _plain(head_tangent, torch.float32),
        out,
        *x_tangent.shape[1:],
        STEP=_step(x_tangent.shape[3]),
        **config,
    )
    return out


def cotangent(x, grad, teach, out):
    if not out.numel():
        return out
    if x is not None and _normed_elsewhere(x):
        v = cotangent(None, grad, teach, new(out, *out.shape))
        return out.copy_(dual_norm(x.float(), v, None, Noise(), _norm_options(x))[1])
    config, programs = _stream(out.shape, out)
    launch(
        triton_losses.cotangent_kernel,
        programs,
        out.device,
        _plain(x),
        _plain(grad, torch.float32),
        _plain(teach, torch.float32),
        out,
        *out.shape[1:],
        STEP=_step(out.shape[3]),
        **config,
    )
    return out


# -- layers with a tangent ----------------------------------------------------------------------------------------


def _norm(z, moved, other, coefficient, noise, options, out, out_tangent):
    dim, channels = options.dim, z.shape[options.dim]
    inner, size = z.shape[dim + 1 :].numel(), z.numel() // len(z)
    outer, last = z.numel() // (channels * inner), inner == 1
    values, state = noise.values, noise.state
    if dim == 0 and values is None and state is not None:  # a row is of all samples
        values = noise.like(z, torch.float32)
    state = state if values is None else None
    law = law_arguments(noise.law, noise.law_scale, noise.low) if state is not None else (None, False, 0.0, 0.0, 0.0)
    config = configuration(TILES["norm"], (outer if last else inner, channels, last), z)
    runs = 1 if coefficient is None else coefficient.shape[dim]
    call = values_per_call(noise.law) if state is not None else 0
    if call and ((channels if last else inner) % call or config["BLOCK_C" if last else "BLOCK_R"] % call):
        call = 0
    launch(
        triton_norm.norm_kernel,
        block_count(outer, config["BLOCK_R"]) if last else outer * block_count(inner, config["BLOCK_R"]),
        z.device,
        _plain(z),
        _plain(moved),
        _plain(other),
        _plain(values),
        state,
        _plain(coefficient, torch.float32),
        out,
        out_tangent,
        outer,
        channels,
        inner,
        max(size // (channels * inner), 1),
        runs,
        float(options.eps),
        *law[2:],
        LAW=law[0],
        HAS_LOW=law[1],
        NOISY=noise.exists,
        RELU=bool(options.relu),
        LAST=last,
        CALL=call,
        SINGLE=runs == 1,
        STEP=_step(channels if last else inner),
        **config,
    )


def dual_norm(z, z_tangent, residual, noise, options):
    if not z.numel():
        return reference.dual_norm(z, z_tangent, residual, noise, options)
    out = z.new_empty((2 if z_tangent is not None or noise.exists else 1, *z.shape))
    _norm(z, z_tangent, residual, None, noise, options, out[0], out[1] if len(out) == 2 else None)
    return out


def activity_grad(z, y, coefficient, noise, options):
    if not z.numel():
        return reference.activity_grad(z, y, coefficient, noise, options)
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    _norm(z, None, y, coefficient, noise, options, out, None)
    return out
