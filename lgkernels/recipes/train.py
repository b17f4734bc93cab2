"""`python -m lgkernels train`: a network trained by one of the rules, beside back-propagation."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, networks, report, rules, settings, weights
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
        print(f"python -m lgkernels train: error: {error}", file=sys.stderr)
        return 2


def _main(given: dict[str, Any]) -> int:
    given.pop("command", None)
    out, name, resume = Path(given.pop("out")), given.pop("name", None), given.pop("resume")
    missing = [m for m in NEEDED if importlib.util.find_spec(m) is None]
    if missing:
        raise UsageError(
            f'{", ".join(missing)} not installed; run: pip install "lgkernels[demo]", in a clone: '
            'pip install -e ".[demo]"'
        )
    if resume:
        if name is None:
            raise UsageError("--resume needs --name, the run to go on with")
        folder = out / name
        chosen = settings.resume(folder, given)
    else:
        chosen = settings.complete(given)
        folder = _new_folder(out, name, chosen)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    dataset = _dataset(chosen)
    weights.check_start(chosen, dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the run's folder {folder} cannot be made ({error.strerror})") from None
    report.write_json(folder / "config.json", chosen.flat())
    return Session(chosen, dataset, folder, resume).run()


def _new_folder(out: Path, name: str | None, chosen: settings.Settings) -> Path:
    if name is not None:
        if (out / name / "config.json").exists():
            raise UsageError(f"run {out / name} exists: add --resume to go on with it, or choose another --name")
        return out / name
    base, number = f"{chosen.data}-{chosen.model}-{chosen.rule}".replace("/", "-"), 1
    while (out / (f"{base}-{number}" if number > 1 else base)).exists():
        number += 1
    return out / (f"{base}-{number}" if number > 1 else base)


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
