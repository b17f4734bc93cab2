"""Matrix products inside Triton kernels: the precision is always stated."""
import torch
import triton
import triton.language as tl


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


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b with float32 operands.

    Operands are widened first: interpreted Triton multiplies the raw bits of bfloat16.
    """
    return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision=PRECISION)
