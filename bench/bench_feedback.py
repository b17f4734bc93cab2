"""Feedback without weight transport: layers, the product with F alone, the fused step, and DFA."""

import pytest

from .bench_lls import Replay
from .feedback_providers import OPS  # noqa: F401  read by conftest.py


@pytest.mark.benchmark(timer=Replay.clock)
def test_feedback(benchmark, case, provider, measured):
    row, times = measured
    Replay.durations = iter(times)
    benchmark.group = case.name
    benchmark.extra_info.update(row)
    benchmark.pedantic(Replay.play, rounds=len(times))
