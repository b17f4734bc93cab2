"""`python -m lgkernels info`: what is here, what each op would use and why, how its trials went, and a self-test."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform

import torch

import lgkernels

from . import advice, dispatch, measured, native, tiles, trust, verdicts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative error (norm of the difference over norm of the truth) that a self-test accepts, by input dtype. Float32
# convolutions may run in TF32 on a GPU.
SELFTEST_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
DEFAULTS = {
    "LGKERNELS_IMPL": "auto",
    "LGKERNELS_CHECK": "0",
    "LGKERNELS_GRAPHS": "1",
    "LGKERNELS_CPU": "the widest that the processor has",
    "LGKERNELS_TRUST": "first-use",
    "LGKERNELS_CACHE_DIR": "the user's folder for caches",
}


def add_arguments(parser):
    parser.add_argument("--selftest", action="store_true", help="run every usable backend of every op on a tiny case")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(arguments):
    report = gather()
    if arguments.selftest:
        report["selftest"] = selftest()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 1 if any(not row["passed"] for row in report.get("selftest", [])) else 0


def devices():
    return [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def gather():
    """Everything that `info` prints, as plain data."""
    return {
        "versions": versions(),
        "devices": {str(device): describe(device) for device in devices()},
        "native": native_module(),
        "environment": environment(),
        "ops": [
            dict(zip(("op", "device", "dtype", "backend", "reason"), (op, str(device), str(dtype)[6:], *chosen)))
            for op in dispatch.registered_ops()
            for device in devices()
            for dtype in DTYPES
            for chosen in [in_effect(op, device, dtype)]
        ],
        "in_short": {str(device): advice.line(device, torch.float32) for device in devices()},
        "verdicts": {str(device): verdicts_on(device) for device in devices() if device.type in trust.DEVICE_TYPES},
        "measured": measurements(),
        "cache": str(verdicts.directory()),
    }


def verdicts_on(device):
    """The file of a device's verdicts, and what they say of each op."""
    path = trust.store(device).path
    return {"file": str(path) if path and path.exists() else None, "ops": advice.evidence(device)}


def measurements():
    """{what: (ours, the library's way)} milliseconds, of this processor."""
    entries = measured.records().entries if native.native() else {}
    return {what: found for what, entry in entries.items() if (found := measured.times(entry))}


def in_effect(op, device, dtype):
    """`(backend, reason)` of `impl="auto"`, LGKERNELS_IMPL included."""
    wanted = os.environ.get("LGKERNELS_IMPL", "auto")
    if wanted == "auto":
        return dispatch.explain(op, device, dtype)
    try:
        return dispatch.choose(op, wanted, device, dtype), f"LGKERNELS_IMPL={wanted}"
    except ValueError as error:
        return "none", f"LGKERNELS_IMPL={wanted}: {error}"


def versions():
    def installed(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "lgkernels": lgkernels.__version__,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def describe(device):
    if device.type == "cpu":
        return f"{measured.processor_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB, "
        f"{properties.multi_processor_count} multiprocessors, train in {str(tiles.half_precision(device))[6:]}"
    )


def native_module():
    module = native.native()
    if module is None:
        return {
            "present": False,
            "reason": native.native_error(),
            "hint": "reinstall with LGKERNELS_BUILD=cpu to see why it can't be built",
        }
    found = {"present": True, "version": module.version, "cpu_level": module.cpu_level(), "cuda": module.has_cuda}
    if module.has_cuda:
        runtime, driver = module.cuda.cuda_runtime_version(), module.cuda.cuda_driver_version()
        found |= {"cuda_runtime": native.version_text(runtime), "cuda_driver": native.version_text(driver)}
        if not driver:
            found["warning"] = "no CUDA driver here: the native CUDA kernels can't run"
        elif driver // 1000 < runtime // 1000:
            found["warning"] = (
                f"the driver serves CUDA {native.version_text(driver)}, the native kernels were built with "
                f'{native.version_text(runtime)}: update the driver, or use impl="triton"'
            )
    return found


def environment():
    names = sorted(
        set(DEFAULTS)
        | {name for name in os.environ if name.startswith("LGKERNELS_")}
        | {"TRITON_INTERPRET", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS"}
    )
    return {
        name: os.environ.get(name, f"(unset: {DEFAULTS[name]})" if name in DEFAULTS else "(unset)") for name in names
    }


def selftest():
    """Every usable backend of every op on a tiny case, against the float64 reference on the CPU."""
    rows = []
    for op in dispatch.registered_ops():
        cases = importlib.import_module(dispatch.family(op) + ".selftest").CASES
        truth = cases[op]("reference", torch.device("cpu"), torch.float64)
        for device in devices():
            for dtype in DTYPES:
                for backend in dispatch.BACKENDS:
                    if dispatch.unavailable(op, backend, device, dtype) is None:
                        error = attempt(cases[op], backend, device, dtype, truth)
                        rows.append(
                            {
                                "op": op,
                                "device": str(device),
                                "dtype": str(dtype)[6:],
                                "backend": backend,
                                "passed": error <= SELFTEST_TOLERANCE[dtype] if isinstance(error, float) else False,
                                "error": error,
                            }
                        )
    return rows


def attempt(case, backend, device, dtype, truth):
    """Largest relative error over the case's results, or the exception's text."""
    try:
        results = case(backend, device, dtype)
    except Exception as error:  # a self-test reports whatever a broken backend raises
        return f"{type(error).__name__}: {error}"
    errors = [
        float((result.detach().cpu().double() - true).norm() / true.norm())
        for result, true in zip(results, truth, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("inf")


def as_text(report):
    lines = [f"{name:<10} {version}" for name, version in report["versions"].items()]
    lines += ["", "devices"] + [f"  {name:<8} {text}" for name, text in report["devices"].items()]
    lines += ["", "native module"] + [f"  {name:<12} {value}" for name, value in report["native"].items()]
    lines += ["", "environment"] + [f"  {name:<20} {value}" for name, value in report["environment"].items()]
    lines += ["", 'what impl="auto" uses here']
    lines += ["  {op:<19} {device:<7} {dtype:<9} {backend:<10} {reason}".format(**row) for row in report["ops"]]
    lines += [""] + [f"in short: {device}: {text}" for device, text in report["in_short"].items()]
    for device, found in report["verdicts"].items():
        lines += ["", f"tried on {device}, kept in {found['file'] or report['cache'] + ' (nothing yet)'}"]
        lines += [f"  {op:<19} {text}" for op, text in found["ops"].items()] or [
            "  nothing: python -m lgkernels verify"
        ]
        if found["file"]:
            lines.append("  python -m lgkernels verify --again repeats trials that failed, --forget drops all verdicts")
    if not report["verdicts"]:
        lines += ["", f"verdicts on GPU kernels are kept in {report['cache']}"]
    if report["measured"]:
        lines += [
            "",
            f"measured on this processor (ms: ours, the library's way), kept in {report['cache']}/processor-*",
        ]
        lines += [f"  {what}: {ours}, {other}" for what, (ours, other) in report["measured"].items()]
    if "selftest" in report:
        lines += ["", "self-test (relative error against the float64 reference)"]
        for row in report["selftest"]:
            error = f"{row['error']:.1e}" if isinstance(row["error"], float) else row["error"]
            lines.append(
                "  {verdict} {op:<19} {device:<7} {dtype:<9} {backend:<10} {error}".format(
                    verdict="PASS" if row["passed"] else "FAIL", **row | {"error": error}
                )
            )
    return "\n".join(lines)
