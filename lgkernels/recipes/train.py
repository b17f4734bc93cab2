"""`python -m lgkernels train`: a network trained by one of the rules, beside back-propagation."""

import argparse
import functools
import importlib.util
import json
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from . import checkpoint, data, instruments, loop, measure, models, networks, report, tuning

DEFAULTS = {
    "rule": "lls",
    "compare": [],
    "model": "smallconv",
    "data": "fashion-mnist",
    "data_dir": None,
    "augment": None,
    "image_size": None,
    "epochs": 10,
    "batch_size": 128,
    "lr": None,
    "bp_lr": None,
    "optimizer": "adamw-schedule-free",
    "seed": 0,
    "threads": None,
    "device": None,
    "amp": "none",
    "limit": None,
    # of the rules that tune unit by unit
    "pretrain": 0,
    "weights": None,
    "adapter": None,
    "units": 4,
    "overlap": 1,
    "contrast": "nt-xent",
    "batch_norm": None,
    "offset_batch": 320,
    "offset_chunk": None,
    "period": None,
    "first_period": None,
    "local_scale": "1",
    "offset_scale": "1",
    "offset_growth": None,
}
_BPM = {
    "augment": "none",
    "image_size": 224,
    "epochs": 30,
    "batch_size": 64,
    "lr": 1e-3,
    "optimizer": "sgd",
    "offset_batch": 320,
    "offset_chunk": 8,
}
PRESETS = {  # the set-ups of "BP-modified local loss" (Ren, Li 2025); units and overlap are not in its text
    "bpm-resnet50": {**_BPM, "model": "resnet50"},
    "bpm-resnet50-lokr": {**_BPM, "model": "resnet50", "adapter": "lokr"},
    "bpm-vit-b-16-lora": {**_BPM, "model": "vit-b-16", "adapter": "lora"},
}
CHANGEABLE = ("epochs", "threads")  # what a resumed run may set anew
NEEDED = ("tqdm", "matplotlib", "safetensors", "schedulefree")


class UsageError(Exception):
    """One line for the user; exit code 2."""


def _option(parser, flag, text, **kwargs):
    default = DEFAULTS.get(flag.lstrip("-").replace("-", "_"))
    text += "" if default in (None, []) else f" (default: {default})"
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kwargs)


def add_arguments(parser):
    option = functools.partial(_option, parser)
    option(
        "--rule",
        f"rule to train with: {', '.join(models.RULES)}; unit by unit: {', '.join(tuning.LOCAL)}, BP-modified "
        f"with -bpm after the name; their rivals: {', '.join(tuning.RIVALS)}",
    )
    option(
        "--compare",
        "rules to train beside it on the same data, the same order of batches and epochs",
        nargs="*",
        metavar="RULE",
    )
    option("--preset", f"settings of a publication, which other options override: {', '.join(PRESETS)}")
    option(
        "--model",
        f"network: {', '.join(models.MODELS)}; for rules without local heads also {', '.join(models.NETWORKS)}",
    )
    option("--data", f"data set: {', '.join(data.SOURCES)}; fashion-mnist without --data-dir is an embedded subset")
    option("--data-dir", "folder that holds the data set's files")
    option(
        "--augment",
        "basic (as the paper's plain runs), full (its ...AUG runs), none; default: none for the "
        "embedded subset, whose few epochs are too short for local rules to gain by it, else basic",
    )
    option("--image-size", "resize images to this height and width, after augmentation", type=int)
    option("--epochs", "passes over the training data", type=int)
    option("--batch-size", "samples in a step", type=int)
    option(
        "--lr",
        "learning rate of all rules but bp; default: 5e-3 with adamw-schedule-free (the LLS paper's), "
        f"{loop.TUNING_RATE:g} for the rules that tune unit by unit with sgd, else the optimizer's usual one",
        type=float,
    )
    option(
        "--bp-lr",
        "learning rate of back-propagation; default as --lr: 5e-3 was the best of 1e-3, 2e-3, 5e-3 for it too",
        type=float,
    )
    option(
        "--optimizer", f"{', '.join(loop.LEARNING_RATES)}; sgd, with momentum 0.9, for the rules that tune unit by unit"
    )
    option("--seed", "of weights, order of batches and augmentation", type=int)
    option("--threads", "CPU threads; default: torch's", type=int)
    option("--device", "cpu, cuda, ...; default: cuda where there is one")
    option("--amp", "automatic mixed precision: none, bf16, fp16 (with gradient scaling)")
    option("--limit", "use only the first so many samples of each split", type=int)
    option("--name", "folder of this run under --out; default: made of data, model and rule")
    unit = parser.add_argument_group("rules that tune unit by unit")
    option = functools.partial(_option, unit)
    option(
        "--pretrain",
        "first so many epochs of back-propagation on half of the classes (kept in the run's folder); "
        "then the rules tune that network on all of them",
        type=int,
    )
    option(
        "--weights",
        "start from this file's weights instead: safetensors or torch's, also torchvision's and timm's "
        "files for resnet50 and vit-b-16",
    )
    option("--adapter", "tune adapters of rank 1 and the classifier alone: lora, lokr")
    option("--units", "number of units with a loss of their own", type=int)
    option("--overlap", "loco: parts of the next unit that a unit's loss goes through", type=int)
    option("--contrast", "loss of loco and gim: nt-xent (two views), supcon (labels)")
    option("--batch-norm", "frozen (the given statistics), batch; default: frozen from given weights")
    option("--period", "steps between two refreshes of the offsets; default: an epoch", type=int)
    option("--first-period", "an extra short period at the start; default: 50 with an adapter", type=int)
    option("--offset-batch", "samples of a refresh", type=int)
    option(
        "--offset-chunk",
        "samples that it back-propagates at once (the paper: 8); default: as many as one unit's memory holds",
        type=int,
    )
    option("--local-scale", "lambda, the factor of the local gradient: a number, or auto: estimated at each refresh")
    option("--offset-scale", "alpha, the factor of the offset: a number, or auto")
    option("--offset-growth", "drop an offset that has grown by more than this factor in a period", type=float)
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
        raise UsageError(
            f'{", ".join(missing)} not installed; run: pip install "lgkernels[demo]", in a clone: '
            'pip install -e ".[demo]"'
        )
    folder, settings = _settings(given, out, name, resume)
    _validate(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    dataset = data.load(settings["data"], settings["data_dir"], settings["augment"])
    dataset = dataset.truncated(settings["limit"])
    if settings["image_size"]:
        dataset.image_size = settings["image_size"]
    if len(dataset.train[1]) < settings["batch_size"]:
        raise UsageError(f"--batch-size {settings['batch_size']} exceeds the {len(dataset.train[1])} training samples")
    smallest = networks.SMALLEST_IMAGE.get(settings["model"], 1)
    if dataset.image_size < smallest:
        raise UsageError(
            f"--model {settings['model']} needs images of {smallest} x {smallest} or more, those of "
            f"{settings['data']} are {dataset.image_size} x {dataset.image_size}"
        )
    fitting = networks.IMAGE.get(settings["model"], dataset.image_size)
    if dataset.image_size != fitting:
        raise UsageError(
            f"--model {settings['model']} needs images of {fitting} x {fitting}: add --image-size {fitting}"
        )
    tuning.check_start(settings, dataset)
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
                raise UsageError(
                    f"--{key.replace('_', '-')} {value} differs from the run's {stored.get(key)}: start a "
                    "new run for it"
                )
        return folder, {**DEFAULTS, **stored, **given}
    preset = given.pop("preset", None)
    if preset is not None:
        _one_of("preset", preset, PRESETS)
        given = {**PRESETS[preset], **given}
    settings = {**DEFAULTS, **given}
    if settings["device"] is None:
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settings["augment"] is None:
        embedded = settings["data"] == "fashion-mnist" and settings["data_dir"] is None
        settings["augment"] = "none" if embedded else "basic"
    if "optimizer" not in given and any(tuning.applies(settings, r) for r in (settings["rule"], *settings["compare"])):
        settings["optimizer"] = "sgd"
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
        _one_of("rule", rule, (*models.RULES, *tuning.RULES))
    _one_of("model", settings["model"], (*models.MODELS, *models.NETWORKS))
    for rule in (settings["rule"], *settings["compare"]):
        if settings["model"] in models.NETWORKS and rule in models.LOCAL_RULES:
            raise UsageError(
                f"--rule {rule} needs a model with local heads ({', '.join(models.MODELS)}), got {settings['model']}"
            )
    _one_of("data set", settings["data"], data.SOURCES)
    _one_of("optimizer", settings["optimizer"], loop.LEARNING_RATES)
    _one_of("amp", settings["amp"], ("none", "bf16", "fp16"))
    _validate_tuning(settings)
    for key in (
        "epochs",
        "batch_size",
        "threads",
        "limit",
        "lr",
        "bp_lr",
        "image_size",
        "units",
        "period",
        "first_period",
        "offset_batch",
        "offset_chunk",
        "offset_growth",
    ):
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


def _validate_tuning(settings):
    rules = (settings["rule"], *settings["compare"])
    for key in ("pretrain", "weights", "adapter"):
        other = [rule for rule in rules if rule != "bp" and rule not in tuning.RULES]
        if settings[key] and other:
            raise UsageError(f"--{key} is for bp and {', '.join(tuning.RULES)}, not for {', '.join(other)}")
    if settings["pretrain"] and settings["weights"]:
        raise UsageError("--pretrain and --weights exclude each other")
    for name, value, known in (
        ("adapter", settings["adapter"], (None, "lora", "lokr")),
        ("contrast", settings["contrast"], ("nt-xent", "supcon")),
        ("batch-norm", settings["batch_norm"], (None, "frozen", "batch")),
    ):
        if value not in known:
            raise UsageError(f"--{name} must be one of: {', '.join(filter(None, known))}, got {value!r}")
    if settings["pretrain"] < 0 or settings["overlap"] < 0:
        raise UsageError(
            f"--pretrain and --overlap must be at least 0, got {settings['pretrain']} and {settings['overlap']}"
        )
    for key in ("local_scale", "offset_scale"):
        try:
            fits = settings[key] == "auto" or math.isfinite(float(settings[key]))
        except ValueError:
            fits = False
        if not fits:
            raise UsageError(f"--{key.replace('_', '-')} must be a number or auto, got {settings[key]!r}")
        batch, chunk = settings["offset_batch"], settings["offset_chunk"]
        if settings[key] == "auto" and (batch < 2 or chunk and (batch % chunk or batch == chunk)):
            raise UsageError(
                f"--{key.replace('_', '-')} auto needs an --offset-batch of at least two whole chunks, got "
                f"{batch} in chunks of {chunk or 1}"
            )
    if "bp-accumulate" in rules and all(settings["batch_size"] % n for n in range(2, tuning.MICRO_BATCHES + 1)):
        raise UsageError(
            f"--batch-size must be divisible by a number from 2 to {tuning.MICRO_BATCHES} for "
            f"bp-accumulate, got {settings['batch_size']}"
        )
    modified = [rule for rule in rules if rule in tuning.MODIFIED]
    if modified and settings["optimizer"] == "adamw-schedule-free":
        raise UsageError(
            f"--optimizer adamw-schedule-free takes no offsets ({', '.join(modified)}): use sgd, adam or adamw"
        )


def _one_of(name, value, known):
    if value not in known:
        raise UsageError(f"unknown {name} {value!r}; expected one of: {', '.join(known)}")


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
            desc=f"{run.rule} epoch {run.epoch + 1}/{run.settings['epochs']}",
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
        print(
            f"{self.title}: {s['epochs']} epochs, batch {s['batch_size']}, {s['optimizer']}, learning rate "
            + ", ".join(f"{loop.learning_rate(s, rule):g} ({rule})" for rule in self.rules)
            + f", {s['device']}"
            + (f" with {torch.get_num_threads()} threads" if s["device"] == "cpu" else "")
        )
        print(f"run folder: {self.folder}", flush=True)
        self.weights = self._start()
        runs = []
        for rule in self.rules:
            run = loop.Run(s, rule, self.dataset, self._path("checkpoint", rule, ".safetensors"), self.weights)
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

    def _start(self):
        """The weights that all rules start from; None: random ones."""
        s, path = self.settings, self.folder / "pretrained.safetensors"
        if s["weights"]:
            return tuning.read_weights(s["weights"])
        if not s["pretrain"]:
            return None
        if not path.exists():
            from safetensors.torch import save

            state = tuning.pretrain(s, self.dataset, functools.partial(print, flush=True))
            checkpoint.write_atomically(path, save(state))
        return tuning.read_weights(path)

    def _interrupted(self):
        out = "" if self.folder.parent == Path("runs") else f" --out {shlex.quote(str(self.folder.parent))}"
        print(
            f"interrupted; go on with: python -m lgkernels train --resume --name {shlex.quote(self.folder.name)}{out}",
            flush=True,
        )
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
            print(
                f"{run.rule} epoch {record['epoch']}/{self.settings['epochs']}: training accuracy "
                f"{100 * record['train_accuracy']:.2f} %, test accuracy {100 * record['test_accuracy']:.2f} %, "
                f"{record['train_seconds']:.1f} s",
                flush=True,
            )
            self._save_weights(run)

    def _save_weights(self, run):
        from safetensors.torch import save

        checkpoint.write_atomically(
            self._path("model", run.rule, ".safetensors"),
            save(run.weights, metadata={"rule": run.rule, "model": self.settings["model"]}),
        )

    def _finish(self):
        s, device = self.settings, torch.device(self.settings["device"])
        probes = {rule: loop.Run(s, rule, self.dataset, None, self.weights) for rule in self.rules}
        order = torch.arange(len(self.dataset.train[1]))
        x, target = next(iter(probes.values())).batch_at(order, 0)
        steps = {rule: self._step(probe.trainer, x, target) for rule, probe in probes.items()}
        seconds = measure.step_times(steps, device)
        results = {}
        for rule, step in steps.items():
            history = self.histories[rule]
            results[rule] = {
                "test_accuracy": history[-1]["test_accuracy"],
                "train_accuracy": history[-1]["train_accuracy"],
                "epochs": len(history),
                "lr": loop.learning_rate(s, rule),
                "ms_per_step": 1e3 * seconds[rule],
                "samples_per_second": s["batch_size"] / seconds[rule],
                "peak_step_bytes": measure.peak_memory(step, device),
                "train_seconds": sum(record["train_seconds"] for record in history),
            }
            if tuning.applies(s, rule):
                results[rule]["state_bytes"] = measure.state_bytes(probes[rule].trainer)
            else:
                results[rule]["signal_macs"] = models.signal_macs(
                    s["model"],
                    rule,
                    in_channels=self.dataset.channels,
                    num_classes=self.dataset.classes,
                    image_size=self.dataset.image_size,
                )
            if rule in tuning.MODIFIED:
                self._measure_refresh(results[rule], probes[rule], seconds[rule], order)
        report.write_json(
            self.folder / "results.json",
            {"settings": s, "data": self.dataset.title, "torch": torch.__version__, "results": results},
        )
        print(f"\n{self.title}, {s['epochs']} epochs, batch {s['batch_size']}")
        print("\n".join(report.table(results)))
        print("\n".join(report.notes(results)))
        print(
            f"curves: {self.folder / 'curves.png'}   weights: {self.folder / 'model.safetensors'}   "
            f"checkpoint: {self.folder / 'checkpoint.safetensors'}",
            flush=True,
        )

    def _measure_refresh(self, result, probe, seconds, order):
        """The refresh's share of memory and time, and what the formula of its work gives."""
        bp = loop.make_trainer(self.settings, "bp", self.dataset, self.weights)
        step = self._step(bp, *probe.batch_at(order, 0))
        bp_seconds = measure.step_times({"bp": step}, probe.device, budget=3.0)["bp"]
        refresh = functools.partial(probe.refresh, order, 0)
        result["peak_step_bytes"] = max(result["peak_step_bytes"], measure.peak_memory(refresh, probe.device))
        result["state_bytes"] = measure.state_bytes(probe.trainer)
        history = self.histories[probe.rule]
        spent = sum(record["refresh_seconds"] for record in history)
        result["refresh_overhead"] = spent / (result["train_seconds"] - spent)
        result["refresh_overhead_formula"] = tuning.formula(
            self.settings, bp_seconds, seconds, len(self.dataset.train[1])
        )

    def _step(self, trainer, x, target):
        def step():
            with loop.autocast(self.settings):
                trainer.step(x, target)

        return step
