"""pytest-benchmark around interleaved rounds: all contestants of a case are timed together, A B C, B C A, ..., by the
first test that needs them; each test then replays its contestant's rounds to pytest-benchmark."""

import os
import statistics
import subprocess
import sys

import pytest
import torch
import torch._dynamo

from . import common, report, timing

_measured, _ceilings = {}, {}


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    presets = ["auto", *common.PRESETS]
    group.addoption("--preset", choices=presets, default="auto", help="auto: gpu if there is one, else cpu")
    group.addoption("--family", choices=common.families(), help="its cases alone")
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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """One process, whatever the repository's options say: two would disturb each other's times."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.numprocesses, config.option.dist, config.option.tx = None, "no", []


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_columns = ["min", "median", "rounds"]


def preset(config):
    name = config.getoption("--preset")
    return ("gpu" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def device_of(config):
    return torch.device("cuda" if torch.cuda.is_available() and preset(config) != "cpu" else "cpu")


def contestants(case, config):
    """(the case on this run's device, {name: contestant})."""
    problem = case.problem(case, device_of(config))
    return problem, {c.name: c for c in common.contestants(problem, not config.getoption("--no-compile"))}


def pytest_generate_tests(metafunc):
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        config = metafunc.config
        cases = common.cases(preset(config), config.getoption("--family"))
        pairs = []
        for case in cases:
            problem, found = contestants(case, config)
            pairs += [pytest.param(case, name, id=f"{case.name}-{name}") for name in found]
            for name, needs in problem.absent().items():
                skip = pytest.mark.skip(reason=f"{name} needs {needs}")
                pairs.append(pytest.param(case, name, id=f"{case.name}-{name}", marks=skip))
        metafunc.parametrize("case, contestant", pairs)


def measure(case, config):
    """{contestant: (row, seconds of each round) or the exception that it raised}; it is correct before it is timed."""
    problem, taking_part = contestants(case, config)
    if problem.copies > 1:  # each compiles anew; beyond the limit torch.compile would quietly run eagerly
        torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    twins = [contestants(case, config)[1] for _ in range(problem.copies - 1)]  # whose memory is their own
    truth, found, timers, sizes = problem.truth(), {}, {}, {}
    for name, contestant in taking_part.items():
        try:
            function = contestant.make()
            result = function() or {}
            assert not truth or contestant.role != "ours" or truth.keys() & result.keys(), "nothing to compare"
            compare(result, truth, problem.tolerance)
            sizes[name] = timing.peak_memory(function, problem.device)
            copies = [function, *(twin[name].make() for twin in twins)]
            timers[name] = timing.timer(copies, problem.device)
        except Exception as error:  # one broken contestant must not hide the others
            found[name] = error
    samples = timing.interleaved(timers, config.getoption("--seconds"), config.getoption("--min-rounds"))
    if case.baseline not in samples:  # nothing to compare with: every contestant reports why
        return {name: found.get(name, found[case.baseline]) for name in taking_part}
    for name, times in samples.items():
        row = {
            **case.row(),
            "provider": name,
            "role": taking_part[name].role,
            "variant": taking_part[name].variant,
            "backend": taking_part[name].backend,
            "huge_pages": timing.huge_pages(),
            "ratio": timing.ratio(times, samples[case.baseline]),
            "peak_bytes": sizes[name] if taking_part[name].allocates_by_torch else None,
            **speed(problem, times, config),
        }
        found[name] = (row, times)
    return found


def speed(problem, times, config):
    """A row's times, and the rates where the problem says what it moves or computes."""
    seconds = statistics.median(times)
    found = {"median_ms": seconds * 1e3, "min_ms": min(times) * 1e3, "rounds": len(times)}
    if problem.bytes:
        found["gb_s"] = problem.bytes / seconds / 1e9
        found["fraction_of_copy"] = found["gb_s"] / ceilings(config)["copy_gb_s"]
    if problem.flops:
        found["tflop_s"] = problem.flops / seconds / 1e12
        found["fraction_of_matmul"] = found["tflop_s"] / ceilings(config)["matmul_tflop_s"]
    return found


def ceilings(config):
    if not _ceilings:
        _ceilings.update(timing.ceilings(device_of(config), small=preset(config) == "smoke"))
    return _ceilings


def compare(got, truth, tolerance):
    for name in got.keys() & truth.keys():
        exact = truth[name].double()
        error = (got[name].double() - exact).norm() / exact.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


@pytest.fixture
def measured(case, contestant, request):
    """(row, seconds of each round) of this contestant."""
    config = request.config
    if case not in _measured:
        _measured.clear()  # the last case's tensors go first
        _measured[case] = measure(case, config)
        if config.getoption("--save") is not None:
            rows = [entry[0] for entry in _measured[case].values() if not isinstance(entry, Exception)]
            environment = timing.environment(device_of(config))
            report.merge(config.getoption("--save"), environment, ceilings(config), rows)
    entry = _measured[case][contestant]
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
