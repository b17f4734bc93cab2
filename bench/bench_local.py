"""Local losses, the step with an offset, and the LoKr adapter."""

import pytest

from .bench_lls import Replay
from .local_providers import OPS  # noqa: F401  read by conftest.py


@pytest.mark.benchmark(timer=Replay.clock)
def test_local(benchmark, case, provider, measured):
    row, times = measured
    Replay.durations = iter(times)
    benchmark.group = case.name
    benchmark.extra_info.update(row)
    benchmark.pedantic(Replay.play, rounds=len(times))
