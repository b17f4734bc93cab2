"""LLS on the CUDA C++ kernels of `lgkernels._C` (csrc/cuda): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""
import torch

from ...core import native

PACKED_BASIS = True  # `head` takes the int32 bit-packed square table (ops/lls/basis.py) besides float tables

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDEST_ROW = 4096  # of an NCHW kernel, whose column sums lie in shared memory; wider tensors go by channels_last


def _call(name, device, *args):
    entries = native.cuda_entries()
    entry = getattr(entries, f"lls_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = entry(*args, torch.cuda.current_stream().cuda_stream)
    else:
        status = entry(*args, 0)
    if status:
        raise RuntimeError(f"lls {name}: CUDA error {status} ({entries.cuda_error_string(status)})")


def _float(tensor):
    """Contiguous float32 of a small tensor (the same one where it is so already)."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _dense(z):
    """`(z, channels_last)`: z itself where one of the two memory formats holds it, else a dense copy."""
    if z.dim() == 2:
        return z.contiguous(), True
    by_channel = z.is_contiguous(memory_format=torch.channels_last)
    if z.shape[3] > _WIDEST_ROW:
        return z.contiguous(memory_format=torch.channels_last), True
    if by_channel and (not z.is_contiguous() or z.shape[2] * z.shape[3] == 1):
        return z, True
    return z.contiguous(), False


def _image(z, channels_last, pool_size):
    """The kernels' description of a tensor; a (B, N) one is N channels of one position."""
    batch, channels, height, width = z.shape if z.dim() == 4 else (*z.shape, 1, 1)
    return batch, channels, height, width, pool_size, pool_size, channels_last, _DTYPES[z.dtype]


def _norm(mean, rstd, gamma, beta):
    """Float32 parameters (kept alive by the caller) and their addresses."""
    tensors = [_float(t) for t in (mean, rstd, gamma, beta)]
    return tensors, [t.data_ptr() for t in tensors]


def norm_act_pool(z, mean, rstd, gamma, beta, negative_slope, pool_size, max_pool, compute_grad):
    parameters, addresses = _norm(mean, rstd, gamma, beta)
    dense, channels_last = _dense(z)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=z.device)  # noqa: E731
    if z.dim() == 2:
        out, latents = torch.empty_like(dense), new(z.shape[0], pool_size)
        _call("linear_norm_act_pool", z.device, *z.shape, pool_size, _DTYPES[z.dtype], addresses, negative_slope,
              _address(dense), _address(out), _address(latents))
        return out, latents, new(0), new(0)
    batch, channels, height, width = z.shape
    size = (height // 2, width // 2) if max_pool else (height, width)
    out = torch.empty((batch, channels, *size), dtype=z.dtype, device=z.device,
                      memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    latents, *sums = (new(batch, channels * pool_size**2) for _ in range(3 if compute_grad else 1))
    s1, s2 = sums or (new(0), new(0))
    _call("norm_act_pool", z.device, _image(z, channels_last, pool_size), addresses, negative_slope, _address(dense),
          max_pool, _address(out), _address(latents), _address(s1), _address(s2))
    if channels_last and z.is_contiguous():
        out = out.contiguous()
    return out, latents, s1, s2
