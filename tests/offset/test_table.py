"""The Triton step's table of addresses: streams, moving gradients, CUDA graphs. The CPU stands in for a device."""

import numpy as np
import pytest
import torch

kernels = pytest.importorskip("lgkernels.ops.offset.triton")


class Device:
    """What the table asks a CUDA device for. A copy is noted with its source, as a graph would keep it."""

    type = "cuda"
    stream, capturing, pinned = 1, False, 0

    def __init__(self, monkeypatch):
        self.copies = []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": self.stream})
        )
        monkeypatch.setattr(kernels, "_pinned", self._pinned)
        monkeypatch.setattr(kernels, "_copied", self._copied)
        monkeypatch.setattr(kernels, "_captured", [])

    def _pinned(self, host):
        assert not self.capturing, "host memory must not be made during a capture"
        return torch.empty(host.shape, dtype=host.dtype)

    def _copied(self, host, device):
        self.copies.append((host, host.clone()))
        return self.copies[-1][1]


@pytest.fixture
def device(monkeypatch):
    kernels._table.cache_clear()
    yield Device(monkeypatch)
    kernels._table.cache_clear()


PIECES = ((16, 32, 48, 64, 4, 7, 0), (160, 0, 480, 0, 4, 9, 2))


def test_rows(device):
    table = kernels._table(PIECES, 4, device)
    assert table.rows.tolist() == [
        [16, 32, 48, 64, 4],
        [32, 48, 64, 80, 3],
        [160, 0, 480, 0, 4],
        [176, 0, 496, 0, 4],
        [192, 0, 512, 0, 1],
    ]


def test_gradients_that_moved(device):
    """Their table is that of a first step, and the one before is as it was."""
    first = kernels._table(PIECES[:1], 4, device)
    before = first.rows.copy()
    fresh = kernels._table(((16, 800, 48, 64, 4, 7, 0),), 4, device)
    assert np.array_equal(first.moved([800, -1, -1]).rows, fresh.rows) and np.array_equal(first.rows, before)


def test_each_stream_has_its_own_copy(device):
    """Nothing orders the second stream behind the copy of the first."""
    table = kernels._table(PIECES, 4, device)
    first = table.on_device()
    assert table.on_device() is first
    device.stream = 2
    second = table.on_device()
    assert second is not first and table.on_device() is second and torch.equal(first, second)


def test_a_first_step_inside_a_capture_says_what_to_do(device):
    device.capturing = True
    with pytest.raises(RuntimeError, match="take a step of the same optimizer, with the same parameters, before each"):
        kernels._table(PIECES, 4, device).on_device()


def test_a_captured_step_reads_the_gradients_of_its_graph(device):
    """The gradients are new in the capture, and the graph's own; what is done later does not change what it copies."""
    table = kernels._table(PIECES[:1], 4, device)
    table.on_device()
    device.capturing = True
    in_graph = table.moved([800])
    assert in_graph.on_device()[:, 1].tolist() == [800, 816]
    source, _ = device.copies[-1]
    with pytest.raises(RuntimeError, match="before each capture"):  # its pinned memory belongs to the first graph
        in_graph.on_device()
    device.capturing = False
    later = in_graph.moved([1600])
    assert later.on_device()[:, 1].tolist() == [1600, 1616]
    assert source[:, 1].tolist() == [800, 816] and any(kept[0] is source for kept in kernels._captured)
    device.capturing = True  # another graph, after a step
    assert later.moved([3200]).on_device()[:, 1].tolist() == [3200, 3216]
