"""What runs an op here, in words: which kernels, and how their trials went; or plain torch, why, and what to do."""

import warnings
from collections import Counter

import torch

from . import dispatch, environment, trust, verdicts

PLAIN = ("reference", "torch")
_warned: set[str] = set()


def remedy(device: torch.device, dtype: torch.dtype) -> str:
    """What to do where no kernel runs."""
    if dtype == torch.float64:
        return "use float32, bfloat16 or float16"
    if device.type in trust.DEVICE_TYPES:
        if trust.policy() == "never":
            return "unset LGKERNELS_TRUST"
        return "`pip install triton`, and see `python -m lgkernels verify`"
    if device.type == "cpu":
        return "install a C++ compiler, and lgkernels again (LGKERNELS_BUILD=cpu shows why it cannot be built)"
    return "use a CPU or a CUDA device"


def has_kernels(op: str, device: torch.device) -> bool:
    """Whether the op is meant to run on kernels there."""
    if device.type in trust.DEVICE_TYPES:
        return bool(set(trust.BACKENDS) & set(dispatch.backends(op))) and trust.has_trial(op)
    return "cpu" in dispatch.backends(op)


def line(device: torch.device | str, dtype: torch.dtype) -> str:
    """One line: what runs there, and if it is plain torch, why and what to do."""
    device = torch.device(device)
    wanted = environment.value("LGKERNELS_IMPL", "auto")
    if wanted != "auto":
        return f"kernels: those of LGKERNELS_IMPL={wanted}"
    chosen = {op: dispatch.explain(op, device, dtype) for op in dispatch.registered_ops() if has_kernels(op, device)}
    _warned.add("none")  # this line says it
    fallen = {op: why for op, (backend, why) in chosen.items() if backend in PLAIN}
    if len(fallen) == len(chosen):
        return f"kernels: none, plain torch runs: {next(iter(fallen.values()))}. To do: {remedy(device, dtype)}"
    names = sorted({backend for backend, _ in chosen.values() if backend not in PLAIN})
    text = f"kernels: {', '.join(names)} ({next(why for backend, why in chosen.values() if backend not in PLAIN)})"
    if fallen:
        text += f"; {', '.join(fallen)} in plain torch: {next(iter(fallen.values()))}"
    failed = [entry for entry in evidence(device).values() if "failed" in entry or "off" in entry]
    return text + (f"; {len(failed)} ops with kernels that failed here: `python -m lgkernels info`" if failed else "")


def evidence(device: torch.device) -> dict[str, str]:
    """{op: "triton: 5 specialisations passed here, 1 failed: why"}, from the verdict store."""
    if device.type not in trust.DEVICE_TYPES:
        return {}
    store, counts, whys = trust.store(device), {}, {}
    for key in store.known:
        name, backend, *rest = key.split("/")
        state, why = store.state(key)
        if rest and name in trust.OPS and state:
            place = trust.OPS[name].group, backend
            counts.setdefault(place, Counter())[state] += 1
            if state == verdicts.BAD:
                whys[place] = why
    found: dict[str, list[str]] = {}
    for op in dispatch.registered_ops():
        for backend in trust.BACKENDS:
            place, (whole, why) = (op, backend), store.state(trust.whole(op, backend))
            number = counts.get(place, Counter())
            parts = [f"{number['good']} specialisations passed here"] if number["good"] else []
            parts += [f"{number['bad']} failed: {whys[place]}"] if number["bad"] else []
            parts += [f"{'off' if whole == verdicts.BAD else 'its tests'}: {why}"] if whole else []
            if parts:
                found.setdefault(op, []).append(f"{backend}: {', '.join(parts)}")
    return {op: "; ".join(texts) for op, texts in found.items()}


def warn_of_fallback(op: str, backend: str, why: str, device: torch.device, dtype: torch.dtype) -> None:
    """Once in a process, where an op that has kernels runs in plain torch and nobody asked for that."""
    if backend not in PLAIN or dtype == torch.float64 or not has_kernels(op, device):
        return
    refused = trust.refusal(op, device)
    key = op if refused else "none"
    if device.type not in ("cpu", *trust.DEVICE_TYPES) or key in _warned or trust.policy() == "never":
        return
    _warned.add(key)
    who = op if refused else "lgkernels"
    do = "`python -m lgkernels info` shows all verdicts" if refused else f"To do: {remedy(device, dtype)}"
    warnings.warn(f"{who} runs in plain torch on {device.type}: {why}. {do}", stacklevel=2)
