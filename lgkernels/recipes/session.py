"""All rules of one command: their runs one after the other, and what they leave in the run's folder."""

import functools
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import advice
from . import checkpoint, instruments, loop, measure, models, optimizers, report, rules, weights
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
    """The first Ctrl-C asks the run to stop after the present step; the second one is an ordinary one."""

    def __enter__(self):
        self.asked = False
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step ...", file=sys.stderr, flush=True)

    def __call__(self):
        return self.asked


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
        self._announce()
        self.start = self._start()
        runs = [self._run(rule.name) for rule in self.settings.rules]
        report.rewrite_metrics(self.folder, [run.history for run in runs])
        with _Stop() as stop:
            try:
                for run in runs:
                    self._train(run, stop)
                    if stop() and run is not runs[-1]:
                        raise loop.Interrupted
            except (loop.Interrupted, KeyboardInterrupt):  # the second Ctrl-C: the last whole epoch is kept
                return self._interrupted()
        self._finish()
        return 0

    def _announce(self) -> None:
        s = self.settings
        rates = (f"{optimizers.learning_rate(s, rule):g} ({rule.name})" for rule in s.rules)
        threads = f" with {torch.get_num_threads()} threads" if s.device == "cpu" else ""
        print(
            f"{self.title}: {s.epochs} epochs, batch {s.batch_size}, {s.optimizer}, learning rate {', '.join(rates)}, "
            f"{s.device}{threads}"
        )
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
            except (KeyError, RuntimeError, ValueError) as error:
                raise UsageError(f"{run.path} does not fit the run's settings ({error})") from None
        elif self.resume:
            print(f"{rule}: {run.path} does not exist, starts from the beginning", flush=True)
        return run

    def _interrupted(self) -> int:
        out = "" if self.folder.parent == Path("runs") else f" --out {shlex.quote(str(self.folder.parent))}"
        print(
            f"interrupted; go on with: python -m lgkernels train --resume --name {shlex.quote(self.folder.name)}{out}",
            flush=True,
        )
        return 130

    def _train(self, run: loop.Run, stop: _Stop) -> None:
        name = run.rule.name
        self.histories[name] = run.history
        if run.finished:
            print(f"{name}: already trained for {run.epoch} epochs", flush=True)
        elif run.epoch or run.batch:
            print(f"{name}: going on at epoch {run.epoch + 1}, batch {run.batch}", flush=True)
        for record in run.train(_Progress, stop):
            report.append_metrics(self.folder, record)
            report.draw_curves(self.folder / "curves.png", self.title, self.histories)
            for picture, labels in run.rule.measures.plots.items():
                own = {name: h for name, h in self.histories.items() if picture in rules.get(name).measures.plots}
                instruments.draw(self.folder / picture, self.title, own, labels)
            print(
                f"{name} epoch {record['epoch']}/{self.settings.epochs}: training accuracy "
                f"{100 * record['train_accuracy']:.2f} %, test accuracy {100 * record['test_accuracy']:.2f} %, "
                f"{record['train_seconds']:.1f} s",
                flush=True,
            )
            self._save_weights(run)

    def _save_weights(self, run: loop.Run) -> None:
        from safetensors.torch import save

        name = run.rule.name
        data = save(run.weights, metadata={"rule": name, "model": self.settings.model})
        checkpoint.write_atomically(self._path("model", name, ".safetensors"), data)

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
