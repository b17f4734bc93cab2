"""`python -m lgkernels <command>`. Each command imports what it needs only when it runs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import lgkernels

# name -> (module with add_arguments(parser) and main(arguments) -> exit code, one line of help)
COMMANDS = {
    "info": ("lgkernels.core.diagnostics", "versions, devices, and what each op would use here and why"),
    "verify": ("lgkernels.core.verify", "try the GPU kernels ahead of their first use, and keep the verdicts"),
    "plan": ("lgkernels.recipes.plan", "which ways of training a model fit into a given memory"),
    "train": ("lgkernels.recipes.train", "train a network with a local rule, beside back-propagation"),
}


def parser() -> argparse.ArgumentParser:
    """For the command's name; each command has a parser of its own."""
    result = argparse.ArgumentParser(prog="python -m lgkernels", description=lgkernels.__doc__)
    result.add_argument("--version", action="version", version=f"lgkernels {lgkernels.__version__}")
    commands = result.add_subparsers(dest="command", metavar="command")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser().print_help()
        return 0
    command = parser().parse_known_args(argv[:1])[0].command
    if command == "train":
        # Fresh memory is the largest hidden cost on a CPU; torch reads this when it is imported.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    name, text = COMMANDS[command]
    module = importlib.import_module(name)
    arguments = argparse.ArgumentParser(prog=f"python -m lgkernels {command}", description=text)
    module.add_arguments(arguments)
    given = arguments.parse_args(argv[1:])
    try:
        importlib.import_module("lgkernels.core.switches").check()
    except ValueError as error:
        print(f"python -m lgkernels {command}: error: {error}", file=sys.stderr)
        return 2
    return module.main(given)


if __name__ == "__main__":
    sys.exit(main())
