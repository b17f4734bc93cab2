"""All rules of one command: their runs one after the other, and what they leave in the run's folder."""

import contextlib
import functools
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import advice
from . import checkpoint, loop, measure, models, optimizers, pictures, report, rules, weights
from .data import Dataset
from .options import UsageError
from .settings import Settings


class _Progress:
    """One epoch's bar, with the training accuracy so far."""

    def __init__(self, run):
        from tqdm import tqdm

        self.bar = tqdm(
            total=run.batches,
            initial=run.batch,
            leave=False,
            disable=None,
            unit="batch",
            desc=f"{run.rule.name} epoch {run.epoch + 1}/{run.settings.epochs}",
        )
        self.next = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def advance(self, run):
        self.bar.update()
        if not self.bar.disable and time.monotonic() > self.next:
            accuracy, loss = run.live()
            self.bar.set_postfix_str(f"accuracy {100 * accuracy:.1f} %, loss {loss:.3f}")
            self.next = time.monotonic() + 0.3


class _Stop:
    """The first Ctrl-C or SIGTERM asks the run to stop after the present step; the second one is an ordinary one."""

    def __enter__(self):
        self.asked = 0  # the signal
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, previous in self.previous.items():
            signal.signal(number, previous)

    def _ask(self, number, _frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            print("\nstopping after this step ...", file=sys.stderr, flush=True)

    def __call__(self):
        return bool(self.asked)


def _epoch_of(path: Path) -> int | None:
    """The epoch that a weights file was written after; None: there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


class Session:
    """All rules of one command, and what they leave in the run's folder."""

    def __init__(self, settings: Settings, dataset: Dataset, folder: Path, resume: bool):
        self.settings, self.dataset, self.folder, self.resume = settings, dataset, folder, resume
        self.title = f"{settings.model} on {dataset.title}"
        self.histories: dict[str, list[dict[str, Any]]] = {}

    def _path(self, stem: str, rule: str, suffix: str) -> Path:
        """The rule's own files have plain names, those of the compared rules carry theirs."""
        return self.folder / (f"{stem}{suffix}" if rule == self.settings.rule else f"{stem}-{rule}{suffix}")

    def run(self) -> int:
        """Train by every rule, or what is left of it, and compare them. Returns the command's exit code."""
        if not self.resume:
            self._keep_settings()  # first of all: from here on there is something to go on with
        self._announce()
        self.start = self._start()
        runs = [self._run(rule.name) for rule in self.settings.rules]
        self._keep_settings()  # of a resumed run once its checkpoints have been accepted
        report.rewrite_metrics(self.folder, [run.history for run in runs])
        with _Stop() as stop:
            try:
                for run in runs:
                    self._train(run, stop)
                    if stop() and run is not runs[-1]:
                        raise loop.Interrupted
            except (loop.Interrupted, KeyboardInterrupt):  # the second Ctrl-C: the last whole epoch is kept
                return self._interrupted(stop.asked or signal.SIGINT)
        self._finish()
        return 0

    def _keep_settings(self) -> None:
        report.write_json(self.folder / "config.json", self.settings.flat())

    def _announce(self) -> None:
        s = self.settings
        rates = (f"{optimizers.learning_rate(s, rule):g} ({rule.name})" for rule in s.rules)
        threads = f" with {torch.get_num_threads()} threads" if s.device == "cpu" else ""
        print(
            f"{self.title}: {s.epochs} epochs, batch {s.batch_size}, {s.optimizer}, learning rate {', '.join(rates)}, "
            f"{s.device}{threads}"
        )
        print(*(f"note: {line}" for line in s.notes()), sep="\n", end="\n" if s.notes() else "")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.amp, torch.float32)
        print(advice.line(s.device, dtype))
        print(f"run folder: {self.folder}", flush=True)

    def _start(self) -> dict[str, Tensor] | None:
        """The weights that all rules start from; None: random ones."""
        s, path = self.settings, self.folder / "pretrained.safetensors"
        if s.weights:
            return weights.read(s.weights)
        if not s.pretrain:
            return None
        if not path.exists():
            from safetensors.torch import save

            state = weights.pretrain(s, self.dataset, functools.partial(print, flush=True))
            checkpoint.write_atomically(path, save(state))
        return weights.read(path)

    def _run(self, rule: str) -> loop.Run:
        """The rule's run, from its checkpoint where the command resumes."""
        run = loop.Run(self.settings, rule, self.dataset, self._path("checkpoint", rule, ".safetensors"), self.start)
        if self.resume and run.path.exists():
            state = checkpoint.load(run.path)
            try:
                run.load_state_dict(state)
            except checkpoint.CheckpointError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UsageError(f"{run.path} does not fit the run's settings ({error})") from None
        elif self.resume:
            print(f"{rule}: {run.path} does not exist, starts from the beginning", flush=True)
        return run

    def _interrupted(self, number: int) -> int:
        out = "" if self.folder.parent == Path("runs") else f" --out {shlex.quote(str(self.folder.parent))}"
        print(
            f"interrupted; go on with: python -m lgkernels train --resume --name {shlex.quote(self.folder.name)}{out}",
            flush=True,
        )
        return 128 + number

    def _train(self, run: loop.Run, stop: _Stop) -> None:
        name = run.rule.name
        self.histories[name] = run.history
        if run.finished:
            print(f"{name}: already trained for {run.epoch} epochs", flush=True)
        elif run.epoch or run.batch:
            print(f"{name}: going on at epoch {run.epoch + 1}, batch {run.batch}", flush=True)
        if run.history:
            self._draw()
        self._settle_weights(run)
        for record in run.train(_Progress, stop, self._prepare_weights):
            report.append_metrics(self.folder, record)
            self._draw()
            os.replace(self._path(".model", name, ".safetensors.next"), self._path("model", name, ".safetensors"))
            print(
                f"{name} epoch {record['epoch']}/{self.settings.epochs}: training accuracy "
                f"{100 * record['train_accuracy']:.2f} %, test accuracy {100 * record['test_accuracy']:.2f} %, "
                f"{record['train_seconds']:.1f} s",
                flush=True,
            )

    def _draw(self) -> None:
        colour = pictures.colours(rule.name for rule in self.settings.rules)
        pictures.curves(self.folder / "curves.png", self.title, self.histories, colour)
        for rule in self.settings.rules:
            for picture, labels in rule.measures.plots.items() if self.histories.get(rule.name) else ():
                own = {name: h for name, h in self.histories.items() if picture in rules.get(name).measures.plots}
                pictures.layers(self.folder / picture, self.title, own, labels, colour)

    def _prepare_weights(self, run: loop.Run) -> None:
        """The weights of the epoch, before its checkpoint, beside those of the epoch before."""
        about = {"rule": run.rule.name, "model": self.settings.model, "epoch": run.epoch}
        about |= {name: getattr(self.dataset, name) for name in ("channels", "classes", "image_size")}
        path = self._path(".model", run.rule.name, ".safetensors.next")
        checkpoint.write_atomically(
            path, checkpoint.serialized(run.weights, {name: str(value) for name, value in about.items()})
        )

    def _settle_weights(self, run: loop.Run) -> None:
        """The weights file is that of the checkpoint's epoch, whenever the run was killed."""
        name = run.rule.name
        path, prepared = self._path("model", name, ".safetensors"), self._path(".model", name, ".safetensors.next")
        if run.epoch and _epoch_of(prepared) == run.epoch:
            os.replace(prepared, path)
        prepared.unlink(missing_ok=True)
        if run.epoch and not run.batch and _epoch_of(path) != run.epoch:  # the file was removed, or damaged
            run.take_weights()
            self._prepare_weights(run)
            os.replace(prepared, path)

    def _finish(self) -> None:
        """Measure a step of every rule, fresh and side by side; write and show what came out."""
        s = self.settings
        probes = [loop.Run(s, rule, self.dataset, None, self.start) for rule in s.rules]
        x, target = probes[0].batch_at(torch.arange(len(self.dataset.train[1])), 0)
        steps = {probe.rule.name: functools.partial(probe.step, x, target) for probe in probes}
        seconds = measure.step_times(steps, probes[0].device)
        results = {probe.rule.name: self._figures(probe, seconds, steps[probe.rule.name]) for probe in probes}
        report.write_json(
            self.folder / "results.json",
            {"settings": s.flat(), "data": self.dataset.title, "torch": torch.__version__, "results": results},
        )
        print(f"\n{self.title}, {s.epochs} epochs, batch {s.batch_size}")
        print("\n".join(report.table(results)))
        print("\n".join(report.notes(results)))
        print(
            f"curves: {self.folder / 'curves.png'}   weights: {self.folder / 'model.safetensors'}   "
            f"checkpoint: {self.folder / 'checkpoint.safetensors'}",
            flush=True,
        )

    def _figures(self, probe: loop.Run, seconds: dict[str, float], step: Any) -> dict[str, Any]:
        """What results.json says of a rule."""
        s, rule = self.settings, probe.rule
        history = self.histories[rule.name]
        figures = {
            "test_accuracy": history[-1]["test_accuracy"],
            "train_accuracy": history[-1]["train_accuracy"],
            "epochs": len(history),
            "lr": optimizers.learning_rate(s, rule),
            "ms_per_step": 1e3 * seconds[rule.name],
            "samples_per_second": s.batch_size / seconds[rule.name],
            "peak_step_bytes": measure.peak_memory(step, probe.device),
            "train_seconds": sum(record["train_seconds"] for record in history),
        }
        if rule.tunes(s):
            figures["state_bytes"] = measure.state_bytes(probe.trainer)
        elif rule.measures.signal_macs is not None:
            sizes = {"in_channels": self.dataset.channels, "num_classes": self.dataset.classes}
            figures["signal_macs"] = models.signal_macs(s.model, rule.name, image_size=self.dataset.image_size, **sizes)
        if rule.measures.end is not None:
            figures |= rule.measures.end(probe, history, figures)
        return figures
