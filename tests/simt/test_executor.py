"""The executor itself: what a GPU does right it does too, and what is wrong in a kernel it reports."""

import pytest
import torch

from tests.simt import executor

pytestmark = pytest.mark.skipif(executor.unavailable() is not None, reason=str(executor.unavailable()))


@pytest.fixture
def simt():
    module = executor.module()
    yield module
    module.set_order("ascending")


def rotate(simt, order, with_barrier, blocks=2, threads=64):
    simt.set_order(order)
    values = torch.arange(blocks * threads, dtype=torch.float32)
    out = torch.full_like(values, -1)
    simt.rotate(values.data_ptr(), out.data_ptr(), blocks, threads, with_barrier)
    return out


@pytest.mark.parametrize("order", executor.ORDERS)
def test_barrier(simt, order):
    expected = torch.arange(128.0).view(2, 64).roll(-1, 1).flatten()
    assert torch.equal(rotate(simt, order, True), expected)


def test_a_missing_barrier_shows_in_another_order(simt):
    """In ascending order only the last thread of a block sees its neighbour's value: the orders disagree."""
    results = [rotate(simt, order, False) for order in executor.ORDERS]
    assert not torch.equal(results[0].nan_to_num(-7), results[1].nan_to_num(-7))
    assert results[0].isnan().any(), "shared memory is not filled with nan"


def two_sums(simt, order, with_barrier, threads):
    simt.set_order(order)
    values = torch.arange(threads, dtype=torch.float32) % 7
    out = torch.full((2, threads), float("nan"))
    simt.two_sums(values.data_ptr(), out.data_ptr(), threads, with_barrier)
    return out, torch.stack([values.sum(), values.square().sum()]).view(2, 1).expand(2, threads)


@pytest.mark.parametrize("order", executor.ORDERS)
def test_a_missing_barrier_beside_a_shuffle_shows(simt, order):
    """Some warp always reads, for the first sum, what a warp far ahead of it has written for the second."""
    out, expected = two_sums(simt, order, True, 256)
    assert torch.equal(out, expected)
    out, expected = two_sums(simt, order, False, 256)
    assert not torch.equal(out, expected)


def test_a_barrier_that_some_threads_skip_is_a_deadlock(simt):
    with pytest.raises(
        RuntimeError,
        match=r"deadlock in block \(0, 0, 0\): 31 threads __syncthreads at line \d+; "
        r"33 threads returned;",
    ):
        simt.divergent_barrier(64, 31)
    simt.divergent_barrier(64, 64)


def test_barriers_at_different_lines_are_a_deadlock(simt):
    with pytest.raises(
        RuntimeError,
        match=r"deadlock.*32 threads __syncthreads at line (\d+); 32 threads "
        r"__syncthreads at line (?!\1)\d+;",
    ):
        simt.two_barriers(64)


@pytest.mark.parametrize("order", executor.ORDERS)
def test_warp_collectives(simt, order):
    simt.set_order(order)
    values = torch.arange(64, dtype=torch.int32)
    out = torch.empty(6, 64, dtype=torch.int32)
    simt.warp_collectives(values.data_ptr(), out.data_ptr(), 64)
    lane, base = values % 32, values // 32 * 32
    assert torch.equal(out[0], base + 5)
    assert torch.equal(out[1], torch.where(lane + 3 < 32, values + 3, values))
    assert torch.equal(out[2], base + (lane ^ 9))
    assert (out[3] == 0xAAAAAAAA - 2**32).all()
    assert torch.equal(out[4], (base == 32).int())
    assert torch.equal(out[5], (base == 0).int())


@pytest.mark.parametrize(
    "blocks, threads, shared", [(0, 32, 0), (1, 0, 0), (1, 33, 0), (1, 1056, 0), (1, 32, 49 * 1024)]
)
def test_impossible_launches_are_refused(simt, blocks, threads, shared):
    with pytest.raises(RuntimeError, match="threads: whole warps|grid is empty|48 KiB"):
        simt.launch_shape(blocks, threads, shared)


def test_the_backend_runs_on_the_executor(simt):
    simt.launches()
    executor.backend("lls").latents(torch.ones(2, 3, 4, 4), 2)
    assert len(simt.launches()) == 1
