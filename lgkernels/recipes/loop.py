"""One rule's training run: epochs, evaluation, and a state that continues bit for bit."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.trainer import Trainer
from . import checkpoint, optimizers, rules, weights
from .data import Dataset
from .settings import Settings

RECALIBRATION_BATCHES = 50


class Interrupted(Exception):
    """The run was stopped between two steps, and its checkpoint written."""


def seeded(*key: Any) -> torch.Generator:
    """A generator of its own for each use, so that a run can go on from any batch."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def make_trainer(
    settings: Settings, rule: rules.Rule, dataset: Dataset, start: dict[str, Tensor] | None = None
) -> Trainer:
    """The trainer of `rule` for the model of `settings`, with fresh weights, or from `start`, a state dict."""
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    sizes = settings.model, dataset.channels, dataset.classes
    task = rules.Task(rule, settings.options(rule), *sizes, dataset.image_size, seed=settings.seed)
    if rule.tunes(settings):
        network = weights.start(settings, dataset, start)
        task = task._replace(network=network, example=_example(settings, dataset).to(device))
    blocks = [block.to(device) for block in rule.build(task)]
    factory = optimizers.factory(settings.optimizer, optimizers.learning_rate(settings, rule))
    scaler = torch.amp.GradScaler(device.type) if settings.amp == "fp16" else None
    return rule.trainer(blocks, factory, task, grad_scaler=scaler)


def _example(settings: Settings, dataset: Dataset) -> Tensor:
    """A batch of training images, of all classes: folders are sorted by class."""
    spread = torch.linspace(0, len(dataset.train[1]) - 1, settings.batch_size).long()
    return dataset.training_batch(spread, torch.Generator().manual_seed(settings.seed))[0]


class Run:
    """Trains `rule`; `state_dict` at any batch and `load_state_dict` later give the same run as without a break."""

    def __init__(
        self,
        settings: Settings,
        rule: str | rules.Rule,
        dataset: Dataset,
        path: Path | None,
        start: dict[str, Tensor] | None = None,
    ):
        self.settings, self.dataset, self.path, self.start = settings, dataset, path, start
        self.rule = rules.get(rule) if isinstance(rule, str) else rule
        self.options = settings.options(self.rule)
        self.device = torch.device(settings.device)
        self.trainer = make_trainer(settings, self.rule, dataset, start)
        self.batches = len(dataset.train[1]) // settings.batch_size
        self.epoch = self.batch = 0
        self.history = []
        self._reset()

    def _reset(self):
        self.losses = self.correct = None
        self.seconds = self.refresh_seconds = 0.0  # of the epoch; those of the rule's `before_step` are among them

    @property
    def finished(self) -> bool:
        return self.epoch >= self.settings.epochs

    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule.name,
            "trainer": self.trainer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "losses": self.losses,
            "correct": self.correct,
            "seconds": self.seconds,
            "refresh_seconds": self.refresh_seconds,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rule"] != self.rule.name:
            raise checkpoint.CheckpointError(f"{self.path} belongs to rule {state['rule']!r}, not {self.rule.name!r}")
        self.trainer.load_state_dict(state["trainer"])
        if not all(isinstance(record, dict) for record in state["history"]) or len(state["history"]) != state["epoch"]:
            raise ValueError(f"its history is not one of {state['epoch']} epochs")
        if not 0 <= state["batch"] <= self.batches:  # all of them: stopped before the epoch's record
            raise ValueError(f"its batch {state['batch']} is not one of {self.batches}")
        self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
        self.losses, self.correct = (t if t is None else t.to(self.device) for t in (state["losses"], state["correct"]))
        self.seconds, self.refresh_seconds = state["seconds"], state.get("refresh_seconds", 0.0)
        torch.set_rng_state(state["rng"])

    def save(self) -> None:
        checkpoint.save(self.path, self.state_dict())

    def train(
        self, progress: Callable, stopping: Callable[[], bool], prepare: Callable[["Run"], None] = lambda run: None
    ) -> Iterator[dict[str, Any]]:
        """Run to the last epoch; yields each epoch's record. `stopping()` true: save and raise Interrupted. `prepare`
        keeps an epoch's `weights`, before its checkpoint."""
        while not self.finished:
            self._epoch(progress, stopping)
            record = self._evaluate()
            self.history.append(record)
            self.epoch, self.batch = self.epoch + 1, 0
            self._reset()
            prepare(self)
            self.save()
            yield record
            if stopping() and not self.finished:
                raise Interrupted

    def _order(self, purpose="order"):
        return torch.randperm(len(self.dataset.train[1]), generator=seeded(self.settings.seed, purpose, self.epoch))

    def batch_at(self, order: Tensor, i: int, purpose: str = "augment") -> tuple[Tensor, Tensor]:
        """Training batch `i` of this epoch on the device."""
        size = self.settings.batch_size
        x, target = self.dataset.training_batch(
            order[i * size : (i + 1) * size], seeded(self.settings.seed, purpose, self.epoch, i)
        )
        return x.to(self.device), target.to(self.device)

    def _epoch(self, progress, stopping):
        order = self._order()
        with progress(self) as bar:
            while self.batch < self.batches:
                start = time.perf_counter()
                if self.rule.before_step is not None:
                    self.rule.before_step(self, order)
                    self.refresh_seconds += time.perf_counter() - start
                x, target = self.batch_at(order, self.batch)
                losses = self.step(x, target)
                correct = (self.trainer.output.argmax(1) == target).sum()
                self.losses = losses if self.losses is None else self.losses + losses
                self.correct = correct if self.correct is None else self.correct + correct
                self.batch += 1
                self.seconds += time.perf_counter() - start
                bar.advance(self)
                if stopping():
                    self.save()
                    raise Interrupted

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a step, and of an evaluation."""
        if self.settings.amp == "none":
            return contextlib.nullcontext()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.amp]
        return torch.autocast(self.device.type, dtype=dtype)

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """Train on one batch; returns its losses."""
        with self.autocast():
            return self.trainer.step(x, target)

    def beside(self, rule: str) -> "Run":
        """A fresh run of another rule, from the same start."""
        return Run(self.settings, rule, self.dataset, None, self.start)

    def live(self) -> tuple[float, float]:
        """Training accuracy and loss of the classifier so far in this epoch (waits for the device)."""
        return self.correct.item() / (self.batch * self.settings.batch_size), self.losses[-1].item() / self.batch

    def _recalibrate(self):
        """Evaluation mode, with its running statistics."""
        order = self._order("recalibrate")
        self.trainer.eval()
        with self.autocast():
            count = 0 if self.settings.frozen_statistics else min(RECALIBRATION_BATCHES, self.batches)
            self.trainer.bn_recalibrate(self.batch_at(order, i, "recalibrate") for i in range(count))

    def _snapshot(self):
        self.weights = {
            f"{i}.{name}": tensor.detach().cpu().clone()
            for i, block in enumerate(self.trainer.blocks)
            for name, tensor in block.state_dict().items()
        }

    @torch.no_grad()
    def take_weights(self) -> None:
        """The weights after the last whole epoch, from its checkpoint."""
        self.epoch -= 1
        self._recalibrate()
        self._snapshot()
        self.trainer.train()
        self.epoch += 1

    @torch.no_grad()
    def _evaluate(self):
        accuracy, _ = self.live()
        record = {
            "rule": self.rule.name,
            "epoch": self.epoch + 1,
            "train_accuracy": accuracy,
            "losses": [_finite(v) for v in (self.losses / self.batch).tolist()],
            "train_seconds": self.seconds,
        }
        self._recalibrate()
        with self.autocast():
            correct, loss, seen = 0, 0.0, 0
            for x, target in self.dataset.test_batches(256):
                logits, target = self.trainer.predict(x.to(self.device)).float(), target.to(self.device)
                correct += (logits.argmax(1) == target).sum()
                loss += F.cross_entropy(logits, target, reduction="sum")
                seen += len(target)
        record.update(test_accuracy=correct.item() / seen, test_loss=_finite(loss.item() / seen))
        self._snapshot()
        self.trainer.train()
        if self.rule.measures.epoch is not None:
            record.update(self.rule.measures.epoch(self))
        return record


def _finite(value):
    return value if math.isfinite(value) else None
