"""Plugin of `pytest --gpu`: the mark `op` says for which registered ops a GPU test speaks, of which it decides alone.

`@pytest.mark.op("lls_loss", ...)` on a test, or as `pytestmark` on its file (the test's own goes first). Ops and the
parameter `backend` go into the junit file as properties, from which `bench/gpu_check.py` reads what has passed.
"""

import pytest


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
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend:
            item.user_properties.append(("backend", backend))
    if faults:
        raise pytest.UsageError("\n".join(faults))


def pytest_report_collectionfinish(items):
    ops = sorted({value for item in items for name, value in item.user_properties if name == "op"})
    return f"ops under test: {', '.join(ops)}"
