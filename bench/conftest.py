"""pytest-benchmark around interleaved rounds: all providers of a case are timed together, A B C, B C A, ..., by the
first test that needs them; each test then replays its provider's rounds to pytest-benchmark."""

import os
import statistics
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from . import providers, report, timing
from .shapes import PRESETS

_measured, _ceilings = {}, {}


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--preset", choices=["auto", *PRESETS], default="auto", help="auto: gpu if there is one, else cpu")
    group.addoption("--seconds", type=float, default=6.0, help="time for the rounds of one case")
    group.addoption("--min-rounds", type=int, default=5)
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out (it needs a compiler)")
    group.addoption(
        "--save",
        nargs="?",
        const="",
        metavar="PATH",
        help="merge results into PATH; default: bench/results/<device>.json",
    )
    group.addoption("--huge-pages", action="store_true", help="CPU: again in a process with THP_MEM_ALLOC_ENABLE=1")


def pytest_collect_file(parent, file_path):
    mine = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if mine and not parent.session.isinitpath(file_path):  # pytest itself collects a file that it is given
        return pytest.Module.from_parent(parent, path=file_path)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_columns = ["min", "median", "rounds"]


def preset(config):
    name = config.getoption("--preset")
    return ("gpu" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def device_of(config):
    return torch.device("cuda" if torch.cuda.is_available() and preset(config) != "cpu" else "cpu")


def pytest_generate_tests(metafunc):
    if {"case", "provider"} <= set(metafunc.fixturenames):
        config = metafunc.config
        cases = [case for case in PRESETS[preset(config)] if case.op in metafunc.module.OPS]
        pairs = [
            (case, name)
            for case in cases
            for name in providers.names(case, device_of(config), not config.getoption("--no-compile"))
        ]
        metafunc.parametrize("case, provider", pairs, ids=[f"{case.name}-{name}" for case, name in pairs])


def measure(case, config):
    """{provider: row or the exception that it raised} of a case; correctness comes before timing."""
    device, sizes = device_of(config), {}
    compiled = not config.getoption("--no-compile")
    problem = providers.builder(case.op)(case, device, compiled)
    rows, timers = {}, {}
    for name in providers.names(case, device, compiled):
        try:
            function = problem.providers[name]
            compare(function(0) or {}, problem)
            sizes[name] = timing.peak_memory(function, device)
            timers[name] = timing.timer(function, device, problem.copies)
        except Exception as error:  # one broken provider must not hide the others
            rows[name] = error
    samples = timing.interleaved(timers, config.getoption("--seconds"), config.getoption("--min-rounds"))
    if problem.baseline not in samples:  # nothing to compare with: every provider reports why
        return {name: rows.get(name, rows[problem.baseline]) for name in providers.names(case, device, compiled)}
    baseline = samples[problem.baseline]
    for name, times in samples.items():
        seconds = statistics.median(times)
        row = {
            "median_ms": seconds * 1e3,
            "min_ms": min(times) * 1e3,
            "rounds": len(times),
            "ratio": timing.ratio(times, baseline),
            "baseline": problem.baseline,
            "peak_bytes": sizes[name],
        }
        if problem.bytes:
            row["gb_s"] = problem.bytes / seconds / 1e9
            row["fraction_of_copy"] = row["gb_s"] / ceilings(config)["copy_gb_s"]
        if problem.flops:
            row["tflop_s"] = problem.flops / seconds / 1e12
            row["fraction_of_matmul"] = row["tflop_s"] / ceilings(config)["matmul_tflop_s"]
        rows[name] = (row, times)
    return rows


def ceilings(config):
    if not _ceilings:
        _ceilings.update(timing.ceilings(device_of(config), small=preset(config) == "smoke"))
    return _ceilings


def compare(results, problem):
    for name in results.keys() & problem.truth.keys():
        truth = problem.truth[name].double()
        error = (results[name].double() - truth).norm() / truth.norm().clamp_min(1e-30)
        assert error <= problem.tolerance, f"{name}: relative error {error:.2e}, allowed {problem.tolerance:.0e}"


@pytest.fixture
def measured(case, provider, request):
    """(row, seconds of each round) of this provider."""
    config = request.config
    if case not in _measured:
        _measured.clear()  # the last case's tensors go first
        _measured[case] = measure(case, config)
        if config.getoption("--save") is not None:
            device = device_of(config)
            rows = [
                {"case": case.name, **asdict(case), "provider": name, "huge_pages": timing.huge_pages(), **entry[0]}
                for name, entry in _measured[case].items()
                if not isinstance(entry, Exception)
            ]
            report.merge(config.getoption("--save"), timing.environment(device), ceilings(config), rows)
    entry = _measured[case][provider]
    if isinstance(entry, Exception):
        raise entry
    return entry


def pytest_sessionfinish(session):
    config = session.config
    if config.getoption("--huge-pages") and not timing.huge_pages():
        arguments = [a for a in config.invocation_params.args if a != "--huge-pages"]
        status = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
        ).returncode
        session.exitstatus = session.exitstatus or status
