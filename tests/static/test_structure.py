"""The structure of the library: which way imports go, how long a file and how wide a function may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lgkernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FLOORS = ("core", "random", "ops.common", "ops", "functional", "nn", "optim", "training", "recipes")  # upwards
LAST = {"__main__", "core.diagnostics"}  # commands: they import what they show
BY_NAME = {  # modules that import others by a name which is made up, and so not seen here
    "": "what the package offers, at first use",
    "_moved": "former names, when a pickle asks for one",
    "__main__": "a command, once it is called",
    "core.diagnostics": "the self-tests of the families that are there",
    "core.dispatch": "the families that are there, and the backend that was chosen",
    "core.ops": "the trials of the family whose op is made",
    "recipes.rules": "the rules that are there",
    "training.planner": "the costs beside the trainers that are there",
    "core.verify": "the cases of a family",
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(name, path=None):
    """Modules of the package that `name` imports, in its functions too: there a circle would only be hidden."""
    path = path or MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    found, waiting = set(), list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        waiting += [c for c in ast.iter_child_nodes(node) if isinstance(c, (ast.stmt, ast.ExceptHandler))]
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("lgkernels.") for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += (node.module or "").split(".")
            if not node.level and base.pop(0) != "lgkernels":
                continue
            base = [part for part in base if part]
            for alias in node.names:
                if not base and alias.name == "_C":  # the native module
                    continue
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in MODULES else ".".join(base))
    return {target for target in found if target in MODULES and target != name}


def floor(name):
    return next((i for i, f in enumerate(FLOORS) if name == f or name.startswith(f + ".")), len(FLOORS))


def test_imports_are_seen():
    assert {"functional", "core.checks", "ops.lls.options"} <= imports("nn.lls_head") | imports("functional.lls")
    assert floor("nn.lls") > floor("functional.lls") > floor("ops.lls.op") > floor("ops.common.dot") > floor("core.ops")


@pytest.mark.parametrize(
    "text",
    [
        "from lgkernels.nn import lls",
        "import lgkernels.nn.lls",
        "try:\n    import os\nexcept ImportError:\n    from ..nn import lls",
        "with open('x'):\n    from ..nn.lls import LLSHead",
        "class A:\n    def f(self):\n        if self:\n            from ..nn import lls",
    ],
)
def test_imports_of_every_form_are_seen(text, tmp_path):
    path = tmp_path / "checks.py"
    path.write_text(text)
    assert "nn.lls" in imports("core.checks", path)


def test_imports_go_down():
    wrong = [
        (name, target)
        for name in MODULES
        if name and name not in LAST
        for target in imports(name)
        if floor(target) > floor(name)
    ]
    assert not wrong


def test_imports_by_name_have_a_reason():
    """`importlib.import_module` goes wherever it likes: only where something is found, or waits for its first use."""
    assert {name for name, path in MODULES.items() if "import_module" in path.read_text()} == set(BY_NAME)
    assert not [name for name, path in MODULES.items() if "__import__(" in path.read_text()]


def test_families_do_not_import_each_other():
    families = [name for name in MODULES if name.startswith("ops.") and not name.startswith("ops.common")]
    wrong = [
        (name, target)
        for name in families
        for target in imports(name)
        if target.startswith("ops.") and target.split(".")[1] not in ("common", name.split(".")[1])
    ]
    assert not wrong


def test_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle of imports: {path[path.index(name) :]}"
        if name in done:
            return
        path.append(name)
        for target in imports(name):
            # a package's __init__ gathers its modules, which import what lies in it by its own name
            if not name.startswith(target + "."):
                visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def test_files_are_short():
    sources = [p for folder in ("lgkernels", "csrc", "bench") for p in (ROOT / folder).rglob("*")]
    sources = [p for p in sources if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    assert len(sources) > 150
    assert not [(str(p), n) for p in sources if (n := len(p.read_text().splitlines())) > 400]


@pytest.mark.parametrize("folder", ["lgkernels", "bench"])
def test_functions_are_narrow(folder):
    """At most twelve positional parameters (kernels of Triton, which have no structs, aside)."""
    wide = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            if len(names) - (names[:1] in (["self"], ["cls"], ["ctx"], ["kernels"])) > 12:
                wide.append((path.name, node.name, len(names)))
    assert not wide
