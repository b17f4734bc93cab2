"""The way back: the network that a run of `train` has left."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import constructors
from ..training.trainer import bare
from . import data, loop, rules, settings
from .options import UsageError


class _Sizes:
    """What a rule's blocks are built from, in the place of the data."""

    def __init__(self, about: dict[str, str], chosen: settings.Settings) -> None:
        source = data.SOURCES[chosen.data]
        self.channels = int(about.get("channels", len(source.statistics[0])))
        self.classes = int(about.get("classes", 100 if chosen.data == "cifar100" else 10))
        size = chosen.image_size or next(iter(source.recipes.values())).size
        self.image_size = int(about.get("image_size", size))
        self.train = None, torch.zeros(chosen.batch_size)

    def training_batch(self, indices: Tensor, generator: Any) -> tuple[Tensor, None]:
        return torch.randn(len(indices), self.channels, self.image_size, self.image_size), None


def load_run(folder: str | Path, rule: str | None = None) -> nn.Sequential:
    """The trained network of a run of ``python -m lgkernels train``, on the CPU, in evaluation mode.

    Its input are images as the run saw them, normalised (``recipes.data.load(...).test_batches`` gives such), its
    output logits. It is made of the rule's blocks: a local head is part of its block and does nothing in evaluation.

    Args:
        folder (str or Path): the run's folder: ``config.json`` and the weights are read, nothing in them is executed.
        rule (str, optional): one of those that the run compared. Default: the run's own.

    Returns:
        nn.Sequential. Raises: TypeError; ValueError where the folder holds no such run.

    Example:
        >>> import lgkernels
        >>> lgkernels.load_run("runs/nothing")
        Traceback (most recent call last):
        ...
        lgkernels.recipes.options.UsageError: no run to resume in runs/nothing (...)
    """
    from safetensors import SafetensorError, safe_open

    constructors.instance("folder", folder, (str, Path), "a path")
    folder = Path(folder)
    chosen = settings.resume(folder, {})
    names = [r.name for r in chosen.rules]
    if rule is not None and rule not in names:
        raise UsageError(f"rule must be one of the run's, {', '.join(names)}, got {rule!r}")
    name = rule or chosen.rule
    path = folder / ("model.safetensors" if name == chosen.rule else f"model-{name}.safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} holds no weights ({error}): let the run finish an epoch") from None
    chosen.device = "cpu"
    with torch.random.fork_rng(devices=[]):
        dataset: Any = _Sizes(about, chosen)
        trainer = loop.make_trainer(chosen, rules.get(name), dataset)
    network = nn.Sequential(*(bare(block) for block in trainer.blocks))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit the settings in {folder / 'config.json'} ({error})") from None
    return network.eval()
