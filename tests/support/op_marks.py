"""Plugin of `pytest --gpu`: marks say what becomes of a GPU test's outcome, and beside what it may run.

`@pytest.mark.op("lls_loss", ...)` on a test, or as `pytestmark` on its file (the test's own goes first): the registered
ops for which it speaks, and of which it decides alone. `@pytest.mark.alone`: it needs the device's memory for itself.
`@pytest.mark.sanitizer`: what it finds is reported, and decides about no op. The properties `op`, `kind` and `backend`
(the parameter of that name) are what tests/support/outcomes.py writes down for bench/gpu_check.py.
"""

import pytest

KINDS = ("alone", "sanitizer")  # else "test"


def faults_of(ops, registered):
    """What is wrong with a test's ops, or None."""
    if not ops:
        return "it has no mark op: say for which registered ops it speaks"
    unknown = sorted(set(ops) - set(registered))
    return f"its mark op names {unknown}; registered are {registered}" if unknown else None


def pytest_collection_modifyitems(items):
    from lgkernels.core import dispatch

    registered, faults = dispatch.registered_ops(), []
    for item in items:
        if not item.path.name.startswith("test_gpu"):
            continue
        mark = item.get_closest_marker("op")
        ops = mark.args if mark else ()
        fault = faults_of(ops, registered)
        if fault:
            faults.append(f"{item.nodeid}: {fault}")
        item.user_properties += [("op", op) for op in ops]
        kind = next((kind for kind in KINDS if item.get_closest_marker(kind)), "test")
        item.user_properties.append(("kind", kind))
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend:
            item.user_properties.append(("backend", backend))
    if faults:
        raise pytest.UsageError("\n".join(faults))


def pytest_report_collectionfinish(items):
    ops = sorted({value for item in items for name, value in item.user_properties if name == "op"})
    return f"ops under test: {', '.join(ops)}"
