"""Arguments of the C++ entry points of `lgkernels._C`: addresses, strides and dtype codes."""

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PACKED = {**DTYPES, torch.int32: 3}  # packed signs


def code(dtype, codes=DTYPES):
    """The kernels' number of a dtype."""
    found = codes.get(dtype)
    if found is None:
        raise TypeError(f"the CPU kernels take {list(codes)}, got {dtype}; float64 runs with impl='reference'")
    return found


def floats(*shape):
    """Memory for a kernel's float32 results, whatever torch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def address(tensor):
    """0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense_rows(matrix):
    """`matrix` itself where its columns lie side by side, else a copy."""
    return matrix if matrix is None or matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def matrix(tensor, codes=DTYPES):
    """The kernels' description of a matrix of dense rows; None: there is none."""
    return None if tensor is None else (address(tensor), tensor.stride(0), code(tensor.dtype, codes))


def feedback(shape, f):
    """The kernels' description of F (`FeedbackMatrix`), whose matrices have dense rows."""
    random = f.random
    return (
        *shape,
        matrix(f.weight, PACKED),
        matrix(f.magnitude),
        0 if random is None else address(random.state),
        f.law,
        f.law_scale,
        f.low,
        f.scale,
        f.sign_plus,
    )
