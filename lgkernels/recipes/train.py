"""`python -m lgkernels train`: a network trained by one of the rules, beside back-propagation."""
import argparse
import importlib.util
import json
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from . import checkpoint, data, instruments, loop, measure, models, report

DEFAULTS = {
    "rule": "lls", "compare": [], "model": "smallconv", "data": "fashion-mnist", "data_dir": None,
    "augment": None, "epochs": 10, "batch_size": 128, "lr": None, "bp_lr": None, "optimizer": "adamw-schedule-free",
    "seed": 0, "threads": None, "device": None, "amp": "none", "limit": None,
}
CHANGEABLE = ("epochs", "threads")  # what a resumed run may set anew
NEEDED = ("tqdm", "matplotlib", "safetensors", "schedulefree")


class UsageError(Exception):
    """One line for the user; exit code 2."""


def add_arguments(parser):
    def option(flag, text, **kwargs):
        name = flag.lstrip("-").replace("-", "_")
        default = DEFAULTS.get(name)
        text += "" if default in (None, []) else f" (default: {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kwargs)

    option("--rule", f"rule to train with: {', '.join(models.RULES)}")
    option("--compare", "rules to train beside it on the same data, the same order of batches and epochs", nargs="*",
           metavar="RULE")
    option("--model", f"network: {', '.join(models.MODELS)}; for rules without local heads also "
           f"{', '.join(models.NETWORKS)}")
    option("--data", f"data set: {', '.join(data.SOURCES)}; fashion-mnist without --data-dir is an embedded subset")
    option("--data-dir", "folder that holds the data set's files")
    option("--augment", "basic (as the paper's plain runs), full (its ...AUG runs), none; default: none for the "
           "embedded subset, whose few epochs are too short for local rules to gain by it, else basic")
    option("--epochs", "passes over the training data", type=int)
    option("--batch-size", "samples in a step", type=int)
    option("--lr", "learning rate of all rules but bp; default: 5e-3 with adamw-schedule-free (the LLS paper's), else "
                   "the optimizer's usual one", type=float)
    option("--bp-lr", "learning rate of back-propagation; default as --lr: 5e-3 was the best of 1e-3, 2e-3, 5e-3 for it too", type=float)
    option("--optimizer", f"{', '.join(loop.LEARNING_RATES)}")
    option("--seed", "of weights, order of batches and augmentation", type=int)
    option("--threads", "CPU threads; default: torch's", type=int)
    option("--device", "cpu, cuda, ...; default: cuda where there is one")
    option("--amp", "automatic mixed precision: none, bf16, fp16 (with gradient scaling)")
    option("--limit", "use only the first so many samples of each split", type=int)
    option("--name", "folder of this run under --out; default: made of data, model and rule")
    parser.add_argument("--out", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on with the run --name, with its settings")


def main(args):
    try:
        return _main(vars(args).copy())
    except (UsageError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"python -m lgkernels train: error: {error}", file=sys.stderr)
        return 2


def _main(given):
    given.pop("command", None)
    out, name, resume = Path(given.pop("out")), given.pop("name", None), given.pop("resume")
    missing = [m for m in NEEDED if importlib.util.find_spec(m) is None]
    if missing:
        raise UsageError(f'{", ".join(missing)} not installed; run: pip install "lgkernels[demo]", in a clone: pip install -e ".[demo]"')
    folder, settings = _settings(given, out, name, resume)
    _validate(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    dataset = data.load(settings["data"], settings["data_dir"], settings["augment"])
    dataset = dataset.truncated(settings["limit"])
    if len(dataset.train[1]) < settings["batch_size"]:
        raise UsageError(f"--batch-size {settings['batch_size']} exceeds the {len(dataset.train[1])} training samples")
    smallest = models.SMALLEST_IMAGE.get(settings["model"], 1)
    if dataset.image_size < smallest:
        raise UsageError(f"--model {settings['model']} needs images of {smallest} x {smallest} or more, those of "
                         f"{settings['data']} are {dataset.image_size} x {dataset.image_size}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the run's folder {folder} cannot be made ({error.strerror})") from None
    report.write_json(folder / "config.json", settings)
    return Session(settings, dataset, folder, resume).run()


def _settings(given, out, name, resume):
    """The run's folder and its complete settings."""
    if resume:
        if name is None:
            raise UsageError("--resume needs --name, the run to go on with")
        folder = out / name
        try:
            stored = json.loads((folder / "config.json").read_text())
            if not isinstance(stored, dict):
                raise ValueError("config.json holds no settings")
        except (OSError, ValueError) as error:
            raise UsageError(f"no run to resume in {folder} ({error})") from None
        for key, value in given.items():
            if key not in CHANGEABLE and stored.get(key) != value:
                raise UsageError(f"--{key.replace('_', '-')} {value} differs from the run's {stored.get(key)}: start a "
                                 "new run for it")
        return folder, {**DEFAULTS, **stored, **given}
    settings = {**DEFAULTS, **given}
    if settings["device"] is None:
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settings["augment"] is None:
        embedded = settings["data"] == "fashion-mnist" and settings["data_dir"] is None
        settings["augment"] = "none" if embedded else "basic"
    settings["compare"] = [rule for rule in dict.fromkeys(settings["compare"]) if rule != settings["rule"]]
    if name is not None:
        if (out / name / "config.json").exists():
            raise UsageError(f"run {out / name} exists: add --resume to go on with it, or choose another --name")
        return out / name, settings
    base, number = f"{settings['data']}-{settings['model']}-{settings['rule']}", 1
    while (out / (f"{base}-{number}" if number > 1 else base)).exists():
        number += 1
    return out / (f"{base}-{number}" if number > 1 else base), settings


def _validate(settings):
    for rule in (settings["rule"], *settings["compare"]):
        _one_of("rule", rule, models.RULES)
    _one_of("model", settings["model"], (*models.MODELS, *models.NETWORKS))
    for rule in (settings["rule"], *settings["compare"]):
        if settings["model"] in models.NETWORKS and rule in models.LOCAL_RULES:
            raise UsageError(f"--rule {rule} needs a model with local heads ({', '.join(models.MODELS)}), got "
                             f"{settings['model']}")
    _one_of("data set", settings["data"], data.SOURCES)
    _one_of("optimizer", settings["optimizer"], loop.LEARNING_RATES)
    _one_of("amp", settings["amp"], ("none", "bf16", "fp16"))
    for key in ("epochs", "batch_size", "threads", "limit", "lr", "bp_lr"):
        if settings[key] is not None and not settings[key] > 0:
            raise UsageError(f"--{key.replace('_', '-')} must be positive, got {settings[key]}")
    if not 0 <= settings["seed"] < 2**63:
        raise UsageError(f"--seed must lie in [0, 2**63), got {settings['seed']}")
    if settings["batch_size"] < 2:
        raise UsageError("--batch-size must be at least 2: batch normalisation needs two samples")
    try:
        torch.empty(1, device=settings["device"])
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {settings['device']} cannot be used ({str(error).splitlines()[0]})") from None


def _one_of(name, value, known):
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; expected one of: {', '.join(known)}")


class _Progress:
    """One epoch's bar, with the training accuracy so far."""

    def __init__(self, run):
        from tqdm import tqdm
        self.bar = tqdm(total=run.batches, initial=run.batch, leave=False, disable=None, unit="batch",
                        desc=f"{run.rule} epoch {run.epoch + 1}/{run.settings['epochs']}")
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

    def __init__(self, settings, dataset, folder, resume):
        self.settings, self.dataset, self.folder, self.resume = settings, dataset, folder, resume
        self.rules = [settings["rule"], *settings["compare"]]
        self.histories = {}

    def _path(self, stem, rule, suffix):
        """The rule's own files have plain names, those of the compared rules carry theirs."""
        return self.folder / (f"{stem}{suffix}" if rule == self.settings["rule"] else f"{stem}-{rule}{suffix}")

    def run(self):
        s = self.settings
        self.title = f"{s['model']} on {self.dataset.title}"
        print(f"{self.title}: {s['epochs']} epochs, batch {s['batch_size']}, {s['optimizer']}, learning rate "
              + ", ".join(f"{loop.learning_rate(s, rule):g} ({rule})" for rule in self.rules)
              + f", {s['device']}" + (f" with {torch.get_num_threads()} threads" if s["device"] == "cpu" else ""))
        print(f"run folder: {self.folder}", flush=True)
        runs = []
        for rule in self.rules:
            run = loop.Run(s, rule, self.dataset, self._path("checkpoint", rule, ".safetensors"))
            if self.resume and run.path.exists():
                state = checkpoint.load(run.path)
                try:
                    run.load_state_dict(state)
                except checkpoint.CheckpointError:
                    raise
                except (KeyError, RuntimeError, ValueError) as error:
                    raise UsageError(f"{run.path} does not fit the run's settings ({error})") from None
            runs.append(run)
        report.rewrite_metrics(self.folder, [run.history for run in runs])
        with _Stop() as stop:
            try:
                for run in runs:
                    self._train(run, stop)
                    if stop() and run is not runs[-1]:
                        raise loop.Interrupted
            except loop.Interrupted:
                return self._interrupted()
            except KeyboardInterrupt:  # the second one: the last whole epoch is kept
                return self._interrupted()
        self._finish()
        return 0

    def _interrupted(self):
        out = "" if self.folder.parent == Path("runs") else f" --out {shlex.quote(str(self.folder.parent))}"
        print("interrupted; go on with: python -m lgkernels train --resume "
              f"--name {shlex.quote(self.folder.name)}{out}", flush=True)
        return 130

    def _train(self, run, stop):
        self.histories[run.rule] = run.history
        if run.finished:
            print(f"{run.rule}: already trained for {run.epoch} epochs", flush=True)
        elif run.epoch or run.batch:
            print(f"{run.rule}: going on at epoch {run.epoch + 1}, batch {run.batch}", flush=True)
        for record in run.train(_Progress, stop):
            report.append_metrics(self.folder, record)
            report.draw_curves(self.folder / "curves.png", self.title, self.histories)
            instruments.draw(self.folder / "alignment.png", self.title, self.histories)
            print(f"{run.rule} epoch {record['epoch']}/{self.settings['epochs']}: training accuracy "
                  f"{100 * record['train_accuracy']:.2f} %, test accuracy {100 * record['test_accuracy']:.2f} %, "
                  f"{record['train_seconds']:.1f} s", flush=True)
            self._save_weights(run)

    def _save_weights(self, run):
        from safetensors.torch import save
        checkpoint.write_atomically(self._path("model", run.rule, ".safetensors"),
                                    save(run.weights, metadata={"rule": run.rule, "model": self.settings["model"]}))

    def _finish(self):
        s, device = self.settings, torch.device(self.settings["device"])
        probe = loop.Run(s, self.rules[0], self.dataset, None)
        x, target = probe.batch_at(torch.arange(len(self.dataset.train[1])), 0)
        steps = {rule: self._step(loop.make_trainer(s, rule, self.dataset), x, target) for rule in self.rules}
        seconds = measure.step_times(steps, device)
        results = {}
        for rule, step in steps.items():
            history = self.histories[rule]
            results[rule] = {
                "test_accuracy": history[-1]["test_accuracy"], "train_accuracy": history[-1]["train_accuracy"],
                "epochs": len(history), "lr": loop.learning_rate(s, rule), "ms_per_step": 1e3 * seconds[rule],
                "samples_per_second": s["batch_size"] / seconds[rule],
                "peak_step_bytes": measure.peak_memory(step, device),
                "signal_macs": models.signal_macs(s["model"], rule, in_channels=self.dataset.channels,
                                                  num_classes=self.dataset.classes, image_size=self.dataset.image_size),
                "train_seconds": sum(record["train_seconds"] for record in history)}
        report.write_json(self.folder / "results.json", {"settings": s, "data": self.dataset.title,
                                                         "torch": torch.__version__, "results": results})
        print(f"\n{self.title}, {s['epochs']} epochs, batch {s['batch_size']}")
        print("\n".join(report.table(results)))
        print("step memory: most that one step holds beyond parameters, optimizer state and input; signal MACs: what "
              "carries\nthe error to the layers, weight gradients not counted")
        print(f"curves: {self.folder / 'curves.png'}   weights: {self.folder / 'model.safetensors'}   "
              f"checkpoint: {self.folder / 'checkpoint.safetensors'}", flush=True)

    def _step(self, trainer, x, target):
        def step():
            with loop.autocast(self.settings):
                trainer.step(x, target)
        return step
