"""`python -m lgkernels train`: a network trained by one of the rules, beside back-propagation."""

import argparse
import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, folders, networks, rules, settings, weights
from .options import UsageError, add_options
from .session import Session

NEEDED = ("tqdm", "matplotlib", "safetensors", "schedulefree")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, settings.Settings)
    parser.add_argument(
        "--preset",
        default=argparse.SUPPRESS,
        help=f"settings of a publication, which other options override: {', '.join(rules.presets())}",
    )
    parser.add_argument(
        "--name",
        default=argparse.SUPPRESS,
        help="folder of this run under --out; default: made of data, model and rule",
    )
    parser.add_argument("--out", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with the run --name, with its settings")
    tuning = [rule.name for rule in rules.found().values() if rule.starts != "random"]
    add_options(parser.add_argument_group("a network with weights", f"for {', '.join(tuning)}"), settings.Start)
    for kind, names in rules.by_options().items():
        add_options(parser.add_argument_group(", ".join(names), kind.__doc__), kind)


def main(args: argparse.Namespace) -> int:
    try:
        return _main(vars(args).copy())
    except (UsageError, data.DataError, checkpoint.CheckpointError) as error:
        return _failed(str(error), 2)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # or Python complains at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(
            "nobody reads this output any more: stopped. What was finished is kept, add --resume to go on", 1
        )
    except OSError as error:
        return _failed(f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error})", 2)


def _failed(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"python -m lgkernels train: error: {message}", file=sys.stderr)
    return code


def _main(given: dict[str, Any]) -> int:
    given.pop("command", None)
    out, name, resume = Path(given.pop("out")), given.pop("name", None), given.pop("resume")
    missing = [m for m in NEEDED if importlib.util.find_spec(m) is None]
    if missing:
        raise UsageError(
            f'{", ".join(missing)} not installed; run: pip install "lgkernels[demo]", in a clone: '
            'pip install -e ".[demo]"'
        )
    if name is not None:
        folders.check_name(name)
    if resume:
        if name is None:
            raise UsageError("--resume needs --name, the run to go on with")
        chosen = settings.resume(out / name, given)
    else:
        chosen = settings.complete(given)
        if name is not None:
            folders.check_new(out / name)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    dataset = _dataset(chosen)
    weights.check_start(chosen, dataset)
    base = f"{chosen.data}-{chosen.model}-{chosen.rule}".replace("/", "-")
    with folders.taken(out, name, base, resume) as folder:
        return Session(chosen, dataset, folder, resume).run()


def _dataset(chosen: settings.Settings) -> data.Dataset:
    """The data, which must fit the batch and the model."""
    dataset = data.load(chosen.data, chosen.data_dir, chosen.augment).truncated(chosen.limit)
    if chosen.image_size:
        dataset.image_size = chosen.image_size
    if len(dataset.train[1]) < chosen.batch_size:
        raise UsageError(f"--batch-size {chosen.batch_size} exceeds the {len(dataset.train[1])} training samples")
    smallest = networks.SMALLEST_IMAGE.get(chosen.model, 1)
    if dataset.image_size < smallest:
        raise UsageError(
            f"--model {chosen.model} needs images of {smallest} x {smallest} or more, those of "
            f"{chosen.data} are {dataset.image_size} x {dataset.image_size}"
        )
    fitting = networks.IMAGE.get(chosen.model, dataset.image_size)
    if dataset.image_size != fitting:
        raise UsageError(f"--model {chosen.model} needs images of {fitting} x {fitting}: add --image-size {fitting}")
    return dataset
