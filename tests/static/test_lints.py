"""Lints of the Triton sources, each with a seeded violation that it must catch.

- program ids come from ops/common/addressing.py and are multiplied only by its `offset` and `indices`, in int64
- every matrix product states its input precision; no block pointers (gone in Triton 3.9), no libdevice (not in the
  interpreter), no atomics
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "lgkernels"
ADDRESSING = ROOT / "ops" / "common" / "addressing.py"
SOURCES = sorted(path for path in ROOT.rglob("*.py") if "import triton" in path.read_text())


def _name(node):
    """Dotted name of a call's function or of an attribute, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_jit(function):
    return any("jit" in _name(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list)


def _tainted(node, names):
    """Does this expression carry an int32 program id?"""
    if isinstance(node, ast.Call):
        return _name(node.func).split(".")[-1] == "program_id"
    if isinstance(node, ast.Name):
        return node.id in names
    return any(_tainted(child, names) for child in ast.iter_child_nodes(node))


def _assignments(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = (
                    zip(target.elts, node.value.elts)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
                yield from ((t.id, value) for t, value in pairs if isinstance(t, ast.Name))
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and isinstance(node.target, ast.Name):
            yield from ((node.target.id, argument) for argument in node.iter.args)


def int32_products(function):
    """Lines that multiply a value derived from a program id outside of `offset` and `indices`."""
    names, before = set(), None
    while before != names:
        before = set(names)
        names |= {name for name, value in _assignments(function) if _tainted(value, names)}
    return [
        f"line {node.lineno}: a program id is multiplied in int32: use offset() or indices()"
        for node in ast.walk(function)
        if isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult)
        and (_tainted(node.left, names) or _tainted(node.right, names))
    ]


def lint(source, addressing=False):
    """The violations in a module's source."""
    found = []
    for function in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and _is_jit(n)):
        found += int32_products(function)
        for node in ast.walk(function):
            name = _name(node) if isinstance(node, ast.Attribute) else ""
            call = _name(node.func) if isinstance(node, ast.Call) else ""
            where = f"line {getattr(node, 'lineno', 0)}"
            if call == "tl.program_id" and not addressing:
                found.append(f"{where}: tl.program_id: use program_id of ops/common/addressing.py")
            if call == "tl.dot" and "input_precision" not in {k.arg for k in node.keywords}:
                found.append(f"{where}: tl.dot without input_precision")
            if name == "tl.make_block_ptr":
                found.append(f"{where}: block pointers are gone in Triton 3.9")
            if "libdevice" in name:
                found.append(f"{where}: libdevice does not run in the interpreter")
            if name.startswith("tl.atomic"):
                found.append(f"{where}: atomics make sums depend on timing")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    assert lint(path.read_text(), path == ADDRESSING) == []


def test_there_is_something_to_lint():
    assert {"triton_norm.py", "triton_head.py", "triton_linear.py", "addressing.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
    "body, message",
    [
        ("p = program_id(0)\n    x = tl.load(z + p * stride)", "multiplied in int32"),
        ("p = program_id(0)\n    b, c = p // 4, p % 4\n    x = tl.load(z + (b + 1) * stride)", "multiplied in int32"),
        ("p = program_id(0)\n    for t in range(p, n, m):\n        x = tl.load(z + t * stride)", "multiplied in int32"),
        ("p = tl.program_id(0)", "tl.program_id"),
        ("c = tl.dot(a, b, c)", "input_precision"),
        ("x = tl.make_block_ptr(z)", "block pointers"),
        ("x = tl.extra.cuda.libdevice.tanh(z)", "libdevice"),
        ("tl.atomic_add(z, x)", "atomics"),
    ],
)
def test_a_seeded_violation_is_caught(body, message):
    found = lint(f"@triton.jit\ndef kernel(z, stride, n, m):\n    {body}\n")
    assert any(message in line for line in found), found


def test_int64_products_pass():
    assert (
        lint(
            "@triton.jit\ndef kernel(z, stride):\n    p = program_id(0)\n    i = indices(p // 4, 64)\n"
            "    x = tl.load(z + offset(p % 4, stride) + i * stride)\n"
        )
        == []
    )
