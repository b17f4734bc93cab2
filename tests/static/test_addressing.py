"""The int64 address helpers, interpreted (int32 wraps there as on a GPU), with strides around 2^31."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from lgkernels.core.dispatch import interpreting  # noqa: E402
from lgkernels.ops.common.addressing import indices, offset, program_id  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreting(), reason="the kernel runs on CPU tensors: set TRITON_INTERPRET=1")


@triton.jit
def _addresses(out, stride, BLOCK: tl.constexpr):
    i = indices(program_id(0), BLOCK)
    tl.store(out + i, offset(i.to(tl.int32), stride))


@pytest.mark.parametrize("stride", [2**31 - 1, 2**31, 2**31 + 1, 2**40])
def test_offset_does_not_wrap(stride):
    out = torch.full((12,), -1, dtype=torch.int64)
    _addresses[(3,)](out, stride, BLOCK=4)
    assert torch.equal(out, torch.arange(12) * stride)


@triton.jit
def _blocks(out, first, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), indices(program_id(0) + first, BLOCK))


def test_indices_do_not_wrap():
    out = torch.empty(1024, dtype=torch.int64)
    _blocks[(1,)](out, 2**30, BLOCK=1024)
    assert torch.equal(out, 2**40 + torch.arange(1024))
