"""Matrix products inside Triton kernels: the precision is always stated."""

import torch
import triton
import triton.language as tl

from .rounding import INTERPRETING, rounded


def float32_precision():
    """`input_precision` of float32 operands: torch's float32 matmul setting.

    "tf32" where torch is allowed to use it. Otherwise "tf32x3", three TensorFloat-32 products of split operands: it
    runs on matrix instructions and keeps float32 accuracy (relative error about 2^-22 a product).
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        precision = matmul.fp32_precision
        if precision == "none":
            precision = getattr(torch.backends, "fp32_precision", "none")
        return "tf32" if precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def precision(dtype):
    """PRECISION of `dot` for operands of `dtype`: "bf16" or "fp16" (their products are exact), or float32's."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype) or float32_precision()


@triton.jit
def _half(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE; interpreted Triton multiplies the raw bits of bfloat16, so there it is widened again."""
    x = rounded(x.to(tl.float32), DTYPE)
    return x.to(tl.float32) if INTERPRETING else x


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; operands are first rounded to half with "bf16" or "fp16", else widened."""
    if PRECISION == "bf16":
        return tl.dot(_half(a, tl.bfloat16), _half(b, tl.bfloat16), accumulator, input_precision="ieee")
    elif PRECISION == "fp16":
        return tl.dot(_half(a, tl.float16), _half(b, tl.float16), accumulator, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision=PRECISION)
