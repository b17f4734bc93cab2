"""Feedback matrices on the CUDA C++ kernels of `lgkernels._C` (csrc/cuda/feedback*.cu): the functions of reference.py.

Every function allocates its outputs with torch.empty and launches on the current stream; nothing synchronises.
"""
import torch

from ...core import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_WEIGHT, _PACKED_SIGNS = -1, 3
_ONES, _MAGNITUDE, _RANDOM = 0, 1, 2
_LAWS = {"uniform": 0, "normal": 1, "uniform8": 2, "sign": 3}

# Up to this many rows of grad the product makes F in registers, beyond that it writes F and calls the library. The
# half dtypes change over earlier: there the library has matrix instructions. Not measured: by the multiply-adds that
# hide behind the reads of W (4096 x 9216) on an H100. A matrix of few rows (DFA: classes) costs little to make again.
_IN_REGISTERS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}
_FEW_ROWS = 32


def _call(name, device, *args):
    entries = native.cuda_entries()
    entry = getattr(entries, f"feedback_{name}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = entry(*args, torch.cuda.current_stream().cuda_stream)
    else:
        status = entry(*args, 0)
    if status:
        raise RuntimeError(f"feedback {name}: CUDA error {status} ({entries.cuda_error_string(status)})")


def _address(tensor):
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _dense_rows(tensor):
    """The kernels take any distance between rows, but no gaps within one."""
    return tensor if tensor is None or tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _rows_of(tensor, kind):
    """(address, dtype code or weight kind, row stride) for the kernels."""
    return (0, kind, 0) if tensor is None else (_address(tensor), kind, tensor.stride(0))


def _strided(tensor):
    return _address(tensor), _DTYPES[tensor.dtype], *tensor.stride()


def _formula(shape, weight, magnitude, random, scale, sign_plus):
    """The kernels' description of F, and the tensors that must outlive the launch."""
    weight, magnitude = _dense_rows(weight), _dense_rows(magnitude)
    kind = _NO_WEIGHT if weight is None else _PACKED_SIGNS if weight.dtype == torch.int32 else _DTYPES[weight.dtype]
    value = _MAGNITUDE if magnitude is not None else _ONES if random is None else _RANDOM
    state, law, law_scale, low = random if value == _RANDOM else (None, "uniform", 1.0, None)
    magnitude_dtype = 0 if magnitude is None else _DTYPES[magnitude.dtype]
    formula = native.cuda_entries().FeedbackMatrix(
        *shape, _rows_of(weight, kind), value, _rows_of(magnitude, magnitude_dtype), _address(state), _LAWS[law],
        law_scale, low, scale, sign_plus)
    return formula, (weight, magnitude, state)


def matrix(shape, weight, magnitude, random, scale, sign_plus, dtype, device):
    formula, _keep = _formula(shape, weight, magnitude, random, scale, sign_plus)
    out = torch.empty(shape, dtype=dtype, device=device)
    _call("matrix", out.device, formula, 0, _address(out), _DTYPES[dtype])
    return out


def rows(index, columns, random, scale, dtype):
    index = index.contiguous()
    formula, _keep = _formula((index.shape[0], columns), None, None, random, scale, False)
    out = torch.empty((index.shape[0], columns), dtype=dtype, device=index.device)
    _call("matrix", out.device, formula, _address(index), _address(out), _DTYPES[dtype])
    return out


def product(grad, columns, weight, magnitude, random, scale, sign_plus):
    (m, n), device = grad.shape, grad.device
    if n == 0:
        return torch.zeros((m, columns), dtype=grad.dtype, device=device)
    if m > _IN_REGISTERS[grad.dtype] and n > _FEW_ROWS:
        return grad @ matrix((n, columns), weight, magnitude, random, scale, sign_plus, grad.dtype, device)
    return product_in_registers(grad, columns, weight, magnitude, random, scale, sign_plus)


def product_in_registers(grad, columns, weight, magnitude, random, scale, sign_plus):
    """`product` for few rows of grad (any number, but never 0 columns of it)."""
    (m, n), device = grad.shape, grad.device
    formula, _keep = _formula((n, columns), weight, magnitude, random, scale, sign_plus)
    out = torch.empty((m, columns), dtype=grad.dtype, device=device)
    splits = native.cuda_entries().feedback_product_splits(formula, m)
    scratch = torch.empty((splits, m, columns), dtype=torch.float32, device=device) if splits > 1 else None
    _call("product", device, formula, _strided(grad), m, _address(out), _DTYPES[grad.dtype], _address(scratch))
    return out


def pack_signs(weight):
    formula, _keep = _formula(weight.shape, weight, None, None, 1.0, False)
    out = torch.empty((weight.shape[0], -(-weight.shape[1] // 32)), dtype=torch.int32, device=weight.device)
    _call("pack_signs", out.device, formula, _address(out))
    return out


def sgd_update_(weight, momentum_buffer, grad, x, lr, momentum, dampening, weight_decay, nesterov, manhattan,
                grad_scale=1.0):
    ours = [_dense_rows(weight), _dense_rows(momentum_buffer)]
    pair = [_rows_of(tensor, 0 if tensor is None else _DTYPES[tensor.dtype]) for tensor in ours]
    shape = (grad.shape[0], *weight.shape)
    _call("sgd_update", weight.device, lr, momentum, dampening, weight_decay, grad_scale, nesterov, manhattan, shape,
          _strided(grad), _strided(x), *pair)
    for theirs, own in zip((weight, momentum_buffer), ours):
        if theirs is not own:
            theirs.copy_(own)
