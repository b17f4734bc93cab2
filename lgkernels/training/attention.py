"""What attention keeps for its backward, by implementation: stands in for torch's on the meta device."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..core import checks

KINDS = ("flash", "eager")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: str) -> torch.Tensor:
        out = torch.empty_like(query)  # the fused kernels lay their output out like the query
        rows = query.shape[:-1]
        kept = out, query.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(
            query, key, value, *(kept if kind == "flash" else [query.new_empty(*rows, key.shape[-2])])
        )
        return out


@contextlib.contextmanager
def counted_attention(kind: Literal["flash", "eager"]) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` on meta tensors keeps q, k, v and, ``"flash"``, its output and one number
    a row, or, ``"eager"``, the matrix of attention weights (softmax(q k^T s) v written out; torch's own unfused path
    keeps scaled copies of q and k besides)."""
    checks.choice("attention", kind, KINDS)
    original = F.scaled_dot_product_attention

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any
    ) -> torch.Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *arguments, **options)
        return _Attention.apply(query, key, value, kind)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
