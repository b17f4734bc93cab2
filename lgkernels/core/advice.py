"""What runs an op here, in words: which kernels, and how their trials went; or plain torch, why, and what to do."""

from collections import Counter

import torch

from . import dispatch, environment, trust, verdicts


def line(device: torch.device | str, dtype: torch.dtype) -> str:
    """One line: what runs there, and if it is plain torch, why and what to do."""
    device = torch.device(device)
    wanted = environment.value("LGKERNELS_IMPL", "auto")
    if wanted != "auto":
        return f"kernels: those of LGKERNELS_IMPL={wanted}"
    chosen = {
        op: dispatch.explain(op, device, dtype) for op in dispatch.registered_ops() if dispatch.has_kernels(op, device)
    }
    dispatch.said_fallback()  # this line says it
    fallen = {op: why for op, (backend, why) in chosen.items() if backend in dispatch.PLAIN}
    if len(fallen) == len(chosen):
        return (
            f"kernels: none, plain torch runs: {next(iter(fallen.values()))}. To do: {dispatch.remedy(device, dtype)}"
        )
    runs = {backend: why for backend, why in chosen.values() if backend not in dispatch.PLAIN}
    text = f"kernels: {', '.join(sorted(runs))} ({next(iter(runs.values()))})"
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
