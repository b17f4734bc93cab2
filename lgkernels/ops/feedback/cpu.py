"""Feedback on the CPU: the functions of `reference.py` over the C++ kernels of `lgkernels._C` (csrc/feedback/cpu,
csrc/direct/cpu).

Rows of a matrix are taken with any stride, columns dense (anything else is copied once). Arithmetic is float32, sums
in an order that no number of threads changes.
"""

import math

import torch

from ...core.native import cpu_entries

_C = cpu_entries()
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKED = {**_DTYPES, torch.int32: 3}

_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # the library then has matrix instructions for bf16


def _library_is_faster(batch, dtype, signs_alone):
    """Whether F written out in `dtype` and the library's product beat the kernel that makes F in the cache.

    Measured on one Zen 4 core with MKL and oneDNN, ratio of the kernel's time to theirs. AVX-512, float32: signs 0.2
    to 0.5 and other F 0.4 to 0.9, at any batch; AVX2: 0.2 to 0.9. bfloat16: signs 0.2 to 1; other F 0.6 at batch 8,
    1.1 to 1.6 at 64 and 128, 2 to 2.6 from 512 on. float16: below 0.05.
    Baseline instructions: 0.7 at 8, 1.4 to 1.8 from 32.
    """
    if _C.cpu_level() == "default":
        return batch >= 32 and dtype != torch.float16
    return batch >= 64 and dtype == torch.bfloat16 and _BF16 and not signs_alone


def _code(dtype, codes=_DTYPES):
    code = codes.get(dtype)
    if code is None:
        raise TypeError(f"the CPU kernels take {list(codes)}, got {dtype}; float64 runs with impl='reference'")
    return code


def _rows(t):
    """`t` itself where its columns lie side by side, else a copy."""
    return t if t is None or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _matrix(t, codes=_DTYPES):
    return None if t is None else (t.data_ptr(), t.stride(0), _code(t.dtype, codes))


def _feedback(shape, weight, magnitude, random, scale, sign_plus):
    state, law, law_scale, low = random or (None, "uniform", 1.0, None)
    address = 0 if state is None or magnitude is not None else state.data_ptr()
    return (*shape, _matrix(weight, _PACKED), _matrix(magnitude), address, law, law_scale, low, scale, sign_plus)


def matrix(shape, weight, magnitude, random, scale, sign_plus, dtype, device):
    weight, magnitude = _rows(weight), _rows(magnitude)
    out = torch.empty(shape, dtype=dtype, device=device)
    f = _feedback(shape, weight, magnitude, random, scale, sign_plus)
    _C.feedback_matrix(f, out.data_ptr(), _code(dtype), torch.get_num_threads())
    return out


def product(grad, columns, weight, magnitude, random, scale, sign_plus):
    batch, rows = grad.shape
    if _library_is_faster(batch, grad.dtype, magnitude is None and random is None):
        return grad @ matrix((rows, columns), weight, magnitude, random, scale, sign_plus, grad.dtype, grad.device)
    grad, weight, magnitude = _rows(grad), _rows(weight), _rows(magnitude)
    out = torch.empty(batch, columns, dtype=grad.dtype, device=grad.device)
    f = _feedback((rows, columns), weight, magnitude, random, scale, sign_plus)
    _C.feedback_product(f, _matrix(grad), batch, out.data_ptr(), _code(grad.dtype), torch.get_num_threads())
    return out


def rows(index, columns, random, scale, dtype):
    index = index.contiguous()
    out = torch.empty(index.shape[0], columns, dtype=dtype, device=index.device)
    f = _feedback((0, columns), None, None, random, scale, False)
    _C.feedback_rows(f, index.data_ptr(), index.shape[0], out.data_ptr(), _code(dtype), torch.get_num_threads())
    return out


def fold(columns, shape, kernel, positions, stride, padding, dilation):
    wanted = shape[0] * math.prod(positions), shape[1] * math.prod(kernel)
    if columns.shape != wanted:
        raise ValueError(f"columns must be {wanted}, got {tuple(columns.shape)}")
    own, out = columns.float().contiguous(), columns.new_empty(shape, dtype=torch.float32)
    windows = (*shape, kernel, positions, stride, padding, dilation)
    _C.feedback_fold(windows, own.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out.to(columns.dtype)


def pack_signs(weight):
    weight, (rows, columns) = _rows(weight), weight.shape
    out = torch.empty(rows, (columns + 31) // 32, dtype=torch.int32, device=weight.device)
    _C.feedback_pack_signs(_matrix(weight), rows, columns, out.data_ptr(), torch.get_num_threads())
    return out


def sgd_update_(
    weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale=1.0
):
    own = [weight, momentum_buffer]
    w, v = (t if t is None else _rows(t.to(weight.dtype)) for t in own)
    grad, x = _rows(grad), _rows(x)
    _C.feedback_sgd_update(
        (lr, momentum, dampening, weight_decay, nesterov, manhattan, grad_scale),
        (*weight.shape, grad.shape[0]),
        *map(_matrix, (w, v, grad, x)),
        torch.get_num_threads(),
    )
    for mine, used in zip(own, (w, v)):
        if used is not mine:
            mine.copy_(used)


def _direct(z, gamma, beta, mean, rstd, slope, max_pool):
    """`(z as contiguous float32 planes, the block)`."""
    own, gamma, beta = (t.float().contiguous() for t in (z, gamma, beta))
    addresses = (t.data_ptr() for t in (own, gamma, beta, mean, rstd))
    return (own, gamma, beta), (*z.shape, *addresses, slope, max_pool)


def direct_forward(z, gamma, beta, running_mean, running_var, momentum, eps, slope, max_pool):
    batch, channels, height, width = z.shape
    size = (height // 2, width // 2) if max_pool else (height, width)
    out = torch.empty(batch, channels, *size, dtype=torch.float32)
    mean, rstd = (torch.empty(channels, dtype=torch.float32) for _ in range(2))
    _held, block = _direct(z, gamma, beta, mean, rstd, slope, max_pool)
    running = (0, 0) if running_mean is None else (running_mean.data_ptr(), running_var.data_ptr())
    _C.direct_forward(block, *running, momentum, eps, out.data_ptr(), torch.get_num_threads())
    return out.to(z.dtype), mean, rstd


def direct_backward_(z, mean, rstd, gamma, beta, delta, error, random, slope, max_pool):
    grad_gamma, grad_beta = torch.empty_like(mean), torch.empty_like(mean)
    held, block = _direct(z, gamma, beta, mean, rstd, slope, max_pool)
    error = None if error is None else _rows(error.float())
    delta = None if delta is None else delta.float().contiguous()
    f = _feedback((0 if error is None else error.shape[1], 0), None, None, random, 1.0, False)
    _C.direct_backward(
        block,
        0 if delta is None else delta.data_ptr(),
        f,
        _matrix(error),
        grad_gamma.data_ptr(),
        grad_beta.data_ptr(),
        torch.get_num_threads(),
    )
    if held[0] is not z:
        z.copy_(held[0])
    return grad_gamma, grad_beta
