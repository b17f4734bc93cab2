"""The settings of a run: what all of its rules share, and the options of each."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import native
from . import data, models, networks, rules, weights
from .optimizers import LEARNING_RATES
from .options import UsageError, choice, flag, known, make, not_negative, option, own_fields, positive
from .rules import Rule

CHANGEABLE = ("epochs", "threads")  # what a resumed run may set anew


@dataclass
class Start:
    """The weights that all rules of a run start from."""

    pretrain: int = option(
        0,
        "first so many epochs of back-propagation on half of the classes (kept in the run's folder); "
        "then the rules tune that network on all of them",
    )
    weights: str | None = option(
        None,
        "start from this file's weights instead: safetensors or torch's, also torchvision's and timm's "
        "files for resnet50 and vit-b-16",
    )
    adapter: str | None = option(None, "tune adapters of rank 1 and the classifier alone: lora, lokr")
    batch_norm: str | None = option(None, "frozen (the given statistics), batch; default: frozen from given weights")

    def __post_init__(self):
        if self.pretrain and self.weights:
            raise UsageError("--pretrain and --weights exclude each other")
        choice(self, "adapter", (None, "lora", "lokr"))
        choice(self, "batch_norm", (None, "frozen", "batch"))
        not_negative(self, "pretrain")

    @property
    def given_start(self) -> bool:
        """Whether the rules tune a network that exists."""
        return bool(self.pretrain or self.weights or self.adapter)

    @property
    def frozen_statistics(self) -> bool:
        """Whether batch normalisation keeps the statistics of the given weights."""
        if self.batch_norm is not None:
            return self.batch_norm == "frozen"
        return bool(self.pretrain or self.weights)


@dataclass
class Settings(Start):
    """Of all rules; `rule_options` has what is given for the options of single ones."""

    rule: str = option("lls", lambda: f"rule to train with: {', '.join(rules.found())}")
    compare: list[str] = option(
        [], "rules to train beside it on the same data, the same order of batches and epochs", metavar="RULE"
    )
    model: str = option(
        "smallconv",
        lambda: (
            f"network: {', '.join(models.MODELS)}; for rules without local heads also "
            f"{', '.join(networks.NETWORKS)}; of rules with networks of their own {', '.join(rules.own_models())}"
        ),
    )
    data: str = option(
        "fashion-mnist", f"data set: {', '.join(data.SOURCES)}; fashion-mnist without --data-dir is an embedded subset"
    )
    data_dir: str | None = option(None, "folder that holds the data set's files")
    augment: str | None = option(
        None,
        "basic (as the paper's plain runs), full (its ...AUG runs), none; default: none for the "
        "embedded subset, whose few epochs are too short for local rules to gain by it, else basic",
    )
    image_size: int | None = option(None, "resize images to this height and width, after augmentation")
    epochs: int = option(10, "passes over the training data")
    batch_size: int = option(128, "samples in a step")
    lr: float | None = option(
        None,
        "learning rate of all rules but back-propagation; default: 5e-3 with adamw-schedule-free (the LLS paper's), "
        f"{weights.TUNING.rates['sgd']:g} where a network is tuned with sgd, else the optimizer's usual one",
    )
    bp_lr: float | None = option(
        None, "learning rate of back-propagation; default as --lr: 5e-3 was the best of 1e-3, 2e-3, 5e-3 for it too"
    )
    optimizer: str = option(
        "adamw-schedule-free", f"{', '.join(LEARNING_RATES)}; sgd, with momentum 0.9, where a network is tuned"
    )
    seed: int = option(0, "of weights, order of batches and augmentation")
    threads: int | None = option(None, "CPU threads; default: torch's")
    device: str | None = option(None, "cpu, cuda, ...; default: cuda where there is one")
    amp: str = option("none", "automatic mixed precision: none, bf16, fp16 (with gradient scaling)")
    limit: int | None = option(None, "use only the first so many samples of each split")
    rule_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for rule in (self.rule, *self.compare):
            rules.get(rule)
        known("model", self.model, (*models.MODELS, *networks.NETWORKS, *rules.own_models()))
        for rule in self.rules:
            theirs = rule.models or (*models.MODELS, *networks.NETWORKS)
            if self.model not in theirs:
                raise UsageError(f"--rule {rule.name} trains {', '.join(theirs)}, got --model {self.model}")
            if rule.heads and self.model not in models.MODELS:
                raise UsageError(
                    f"--rule {rule.name} needs a model with local heads ({', '.join(models.MODELS)}), got {self.model}"
                )
        known("data set", self.data, data.SOURCES)
        known("optimizer", self.optimizer, LEARNING_RATES)
        known("amp", self.amp, ("none", "bf16", "fp16"))
        super().__post_init__()
        self._check_start()
        positive(self, "epochs", "batch_size", "threads", "limit", "lr", "bp_lr", "image_size")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must lie in [0, 2**63), got {self.seed}")
        if self.batch_size < 2:
            raise UsageError("--batch-size must be at least 2: batch normalisation needs two samples")
        if self.device is not None:
            try:
                torch.empty(1, device=self.device)
            except (RuntimeError, AssertionError) as error:
                raise UsageError(f"--device {self.device} cannot be used ({str(error).splitlines()[0]})") from None
        for kind in rules.by_options():
            make(kind, self.rule_options)

    def _check_start(self) -> None:
        others = [rule.name for rule in self.rules if rule.starts == "random"]
        for name in ("pretrain", "weights", "adapter"):
            if getattr(self, name) and others:
                both, tuning = (
                    [r.name for r in rules.found().values() if r.starts == kind] for kind in ("either", "network")
                )
                raise UsageError(
                    f"{flag(name)} is for {', '.join(both)} and {', '.join(tuning)}, not for {', '.join(others)}"
                )

    @property
    def rules(self) -> list[Rule]:
        return [rules.get(name) for name in (self.rule, *self.compare)]

    def options(self, rule: Rule) -> Any:
        """The rule's options."""
        return make(rule.options, self.rule_options)

    def notes(self) -> list[str]:
        """What the run's rules take that is not usual for them."""
        lines = []
        usual = {rule.name: rule.defaults(self).optimizer for rule in self.rules}
        if usual[self.rule] == self.optimizer and len(self.rules) > 1:
            lines.append(f"{self.optimizer} is the usual optimizer of {self.rule}, and all rules take it")
        other = [f"{name}'s is {usual[name]}" for name in usual if usual[name] not in (None, self.optimizer)]
        if other:
            lines.append(f"all rules take {self.optimizer}, where {', '.join(other)}: --optimizer sets it for all")
        return lines

    def check(self) -> None:
        """Refuse settings that this machine or a rule cannot train with."""
        if self.threads is not None and self.threads > native.MOST_THREADS:
            raise UsageError(f"--threads must be at most {native.MOST_THREADS}, got {self.threads}")
        for rule in self.rules:
            try:
                rule.check(self, self.options(rule))
            except ValueError as error:
                raise UsageError(str(error)) from None

    def flat(self) -> dict[str, Any]:
        """All settings in one dict, with the options of the run's rules."""
        result = {f.name: getattr(self, f.name) for kind in (Settings, Start) for f in own_fields(kind)}
        for rule in self.rules:
            result |= dataclasses.asdict(self.options(rule))
        return result


def from_flat(values: Mapping[str, Any]) -> Settings:
    """Settings from such a dict, as far as it goes; what no rule knows (any more) is left out."""
    common = {f.name for f in dataclasses.fields(Settings)} - {"rule_options"}
    options = {f.name for kind in rules.by_options() for f in own_fields(kind)}
    return Settings(
        **{name: value for name, value in values.items() if name in common},
        rule_options={name: value for name, value in values.items() if name in options},
    )


def complete(given: Mapping[str, Any]) -> Settings:
    """The settings of a new run: what is given, over those of a preset, and what follows from them."""
    presets, given = rules.presets(), dict(given)
    preset = given.pop("preset", None)
    if preset is not None:
        known("preset", preset, presets)
        given = {**presets[preset], **given}
    rule = rules.found().get(given.get("rule", ""))
    if rule is not None and rule.models:
        given.setdefault("model", rule.models[0])
    settings = from_flat(given)
    if settings.device is None:
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.augment is None:
        embedded = settings.data == "fashion-mnist" and settings.data_dir is None
        settings.augment = "none" if embedded else "basic"
    if "optimizer" not in given:
        # the run's own rule decides: one that is merely compared changes nothing of the others
        settings.optimizer = rules.get(settings.rule).defaults(settings).optimizer or settings.optimizer
    settings.compare = [rule for rule in dict.fromkeys(settings.compare) if rule != settings.rule]
    settings.check()
    return settings


def resume(folder: Path, given: Mapping[str, Any]) -> Settings:
    """The settings of the run in `folder`, of which `given` may change some."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        if not isinstance(stored, dict):
            raise ValueError("config.json holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"no run to resume in {folder} ({error})") from None
    try:
        before = from_flat(stored).flat()  # without the options of other rules, which this run does not read
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / 'config.json'} does not hold the settings of a run ({error})") from None
    for name, value in given.items():
        if name not in CHANGEABLE and name in before and before[name] != value:
            raise UsageError(f"{flag(name)} {value} differs from the run's {before[name]}: start a new run for it")
    settings = from_flat({**stored, **given})
    settings.check()
    return settings
