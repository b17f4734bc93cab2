"""LLS on the CPU: the functions of `reference.py` over the C++ kernels of `lgkernels._C` (csrc/lls/cpu).

Tensors reach C++ as addresses, sizes and a dtype code; outputs are allocated here. Activations are taken in
either dense memory format as they are, anything else is copied once. Arithmetic is float32.
"""

import torch

from ...core.native import cpu_entries, threads
from ..common.cpu import floats
from . import basis as tables
from .options import Capabilities

_C = cpu_entries()
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

CAPABILITIES = Capabilities(packed_basis=_C is not None and _C.lls_packed_signs(), converts_layouts=True)


def _channels_last(t):
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _dense(t):
    """`t` itself where it is dense in one of the two formats, else a contiguous copy."""
    return t if t.is_contiguous() or _channels_last(t) else t.contiguous()


def _float(t):
    return t.to(torch.float32).contiguous()


def _activation(t):
    """Address, (B, C, H, W), format and dtype code; (B, N) is one channel and one row of N columns."""
    shape = t.shape if t.dim() == 4 else (t.shape[0], 1, 1, t.shape[1])
    return (t.data_ptr(), *shape, _channels_last(t), _code(t))


def _preactivation(t):
    """As `_activation`, but N are the channels."""
    if t.dim() == 4:
        return _activation(t)
    return (t.data_ptr(), *t.shape, 1, 1, True, _code(t))


def _code(t):
    code = _DTYPES.get(t.dtype)
    if code is None:
        raise TypeError(f"the CPU kernels take {list(_DTYPES)}, got {t.dtype}; float64 runs with impl='reference'")
    return code


def _pools(t, pool_size):
    return (pool_size, pool_size) if t.dim() == 4 else (1, pool_size)


def _latent_size(t, pool_size):
    return t.shape[1] * pool_size * pool_size if t.dim() == 4 else pool_size


def _address(t):
    return 0 if t is None else t.data_ptr()


def latents(activation, pool_size):
    if activation.dim() == 2 and pool_size == activation.shape[1]:
        return _float(activation)
    a = _dense(activation)
    out = floats(a.shape[0], _latent_size(a, pool_size))
    _C.lls_latents(_activation(a), *_pools(a, pool_size), out.data_ptr(), threads())
    return out


def _sign_layouts(signs, dim):
    """`signs` in the orders that the kernels read, made once and kept on the (shared, constant) tensor."""
    kept = getattr(signs, "_lgk_layouts", None)
    if kept is None or kept[0] != signs._version:
        rows = signs.shape[0]
        layouts = torch.empty(_C.lls_sign_layouts_size(rows, dim), dtype=torch.int32, device="cpu")
        _C.lls_sign_layouts(signs.contiguous().data_ptr(), rows, dim, layouts.data_ptr())
        kept = signs._lgk_layouts = (signs._version, layouts)
    return kept[1]


def head(x, target, modulation, basis, options, compute_grad):
    x = _float(x)
    batch, dim = x.shape
    rows = basis.shape[0]
    packed = basis.dtype == torch.int32
    if packed and not CAPABILITIES.packed_basis:
        basis, packed = tables.unpack_signs(basis, dim), False
    basis = _sign_layouts(basis, dim) if packed else _float(basis)
    target = target.to(torch.int64).contiguous()
    modulation = None if modulation is None else _float(modulation)
    value = floats((batch,) if options.reduction == "none" else ())
    similarity = floats(batch, rows)
    grad_latents = floats((batch, dim) if compute_grad else 0)
    grad_logits = floats((batch, options.num_classes) if compute_grad else 0)
    _C.lls_head(
        options,
        (
            batch,
            dim,
            rows,
            x.data_ptr(),
            target.data_ptr(),
            _address(modulation),
            modulation is not None and modulation.dim() == 1,
            0 if packed else basis.data_ptr(),
            basis.data_ptr() if packed else 0,
            compute_grad,
        ),
        (value.data_ptr(), similarity.data_ptr(), grad_latents.data_ptr(), grad_logits.data_ptr()),
        threads(),
    )
    return value, grad_latents, similarity, grad_logits


def modulation_grad(similarity, grad_logits, vector, scale):
    (batch, rows), classes = similarity.shape, grad_logits.shape[1]
    s, g, scale = map(_float, (similarity, grad_logits, scale))
    out = floats(classes if vector else (rows, classes))
    pointers = s.data_ptr(), g.data_ptr(), scale.data_ptr()
    _C.lls_modulation_grad((batch, rows, classes, vector, *pointers, scale.dim() > 0, out.data_ptr()), threads())
    return out


def expand_grad(grad_latents, scale, out, pool_size):
    if out.shape == grad_latents.shape and out.dtype == grad_latents.dtype:  # nothing was pooled
        return torch.mul(grad_latents, scale[:, None] if scale.dim() else scale, out=out)
    dense, g, scale = _dense(out), _float(grad_latents), _float(scale)
    _C.lls_expand_grad(
        _activation(dense), *_pools(out, pool_size), g.data_ptr(), scale.data_ptr(), scale.dim() > 0, threads()
    )
    return out if dense is out else out.copy_(dense)


def to_channels_last(x):
    """`x.contiguous(memory_format=torch.channels_last)`, faster."""
    if _channels_last(x) or not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last, device="cpu")
    _C.lls_to_channels_last(_activation(x), out.data_ptr(), threads())
    return out


def to_contiguous(x):
    """`x.contiguous()`, faster."""
    if not _channels_last(x):
        return x.contiguous()
    batch, channels, height, width = x.shape
    out = torch.empty(
        x.shape, dtype=x.dtype, device="cpu"
    )  # the same transposition, with channels and positions in each other's place
    turned = (x.data_ptr(), batch, height * width, channels, 1, False, _code(x))
    _C.lls_to_channels_last(turned, out.data_ptr(), threads())
    return out


# -- the pieces of the fused block -----------------------------------------------------------------------------


def batch_stats(z, bias, running_mean, running_var, momentum, eps):
    z = _dense(z)
    mean, rstd = (floats(z.shape[1]) for _ in range(2))
    bias = None if bias is None else _float(bias)
    running = [t if t is None else _float(t) for t in (running_mean, running_var)]
    _C.lls_batch_stats(
        _preactivation(z),
        (_address(bias), *map(_address, running), momentum, eps, mean.data_ptr(), rstd.data_ptr()),
        threads(),
    )
    for own, used in zip((running_mean, running_var), running):
        if used is not own:
            own.copy_(used)
    return mean, rstd


def _norm(*vectors):
    vectors = [_float(v) for v in vectors]
    return vectors, [v.data_ptr() for v in vectors]


def norm_act_pool(
    z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad, out_channels_last=None
):
    """`out_channels_last`: memory format of `out` where it is not to be z's."""
    z = _dense(z)
    kept, norm = _norm(mean, rstd, gamma, beta)
    last = _channels_last(z) if out_channels_last is None else out_channels_last
    if z.dim() == 2:  # N channels of one position each: "latents" of 1 x 1 bins are the activation in float32
        out = torch.empty_like(z)
        activated = floats(z.shape)
        _C.lls_norm_act_pool(
            _preactivation(z),
            1,
            1,
            (*norm, negative_slope),
            False,
            out.data_ptr(),
            True,
            activated.data_ptr(),
            0,
            0,
            threads(),
        )
        empty = activated.new_empty(0)
        return out, latents(activated, pool_size), empty, empty
    if last and not _channels_last(z):
        z = to_channels_last(z)
    batch, channels, height, width = z.shape
    size = (height // 2, width // 2) if max_pool else (height, width)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = torch.empty((batch, channels, *size), dtype=z.dtype, memory_format=memory_format, device="cpu")
    dim = channels * pool_size * pool_size
    pooled = floats(batch, dim)
    s1, s2 = (floats((batch, dim) if compute_grad else 0) for _ in range(2))
    _C.lls_norm_act_pool(
        _activation(z),
        pool_size,
        pool_size,
        (*norm, negative_slope),
        max_pool,
        out.data_ptr(),
        last,
        pooled.data_ptr(),
        s1.data_ptr(),
        s2.data_ptr(),
        threads(),
    )
    return out, pooled, s1, s2


def norm_grads(grad_latents, s1, s2, channels, area):
    g, s1, s2, area = (_float(t) for t in (grad_latents, s1, s2, area))
    grads = [floats(channels) for _ in range(3)]
    _C.lls_norm_grads(
        g.shape[0],
        channels,
        area.numel(),
        g.data_ptr(),
        s1.data_ptr(),
        s2.data_ptr(),
        area.data_ptr(),
        *(t.data_ptr() for t in grads),
        threads(),
    )
    return tuple(grads)


def grad_preactivation_(
    z, mean, rstd, gamma, beta, negative_slope, grad_latents, grad_gamma, grad_beta, pool_size, scale
):
    dense = _dense(z)
    kept, norm = _norm(mean, rstd, gamma, beta)
    grads = [_float(t) for t in (grad_latents, grad_gamma, grad_beta)]
    _C.lls_grad_preactivation(
        _activation(dense),
        *_pools(z, pool_size),
        (*norm, negative_slope),
        *(t.data_ptr() for t in grads),
        float(scale),
        threads(),
    )
    return z if dense is z else z.copy_(dense)


def linear_grad_preactivation_(z, mean, rstd, gamma, beta, negative_slope, grad_latents, pool_size, scale):
    dense, grad = _dense(z), _float(grad_latents)
    if pool_size != z.shape[1]:
        grad = expand_grad(grad, torch.ones((), dtype=torch.float32, device="cpu"), floats(z.shape), pool_size)
    kept, norm = _norm(mean, rstd, gamma, beta)
    grads = [floats(z.shape[1]) for _ in range(3)]
    _C.lls_linear_grad_preactivation(
        _preactivation(dense),
        (*norm, negative_slope),
        grad.data_ptr(),
        *(t.data_ptr() for t in grads),
        float(scale),
        threads(),
    )
    if dense is not z:
        z.copy_(dense)
    return tuple(grads)
