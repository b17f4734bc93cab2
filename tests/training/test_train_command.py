"""`python -m lgkernels train` from end to end, on a few hundred images."""

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lgkernels.__main__ as command
from lgkernels.core import native
from lgkernels.recipes import checkpoint, data, loop, measure, report, rules, train
from lgkernels.recipes.settings import from_flat

for needed in train.NEEDED:
    pytest.importorskip(needed)

SMALL = ["--limit", "64", "--batch-size", "16", "--epochs", "2"]
FEEDBACK, DIRECT = ([rule.name for rule in rules.families()[family].RULES] for family in ("feedback", "direct"))
TINY = ["--limit", "32", "--batch-size", "16", "--epochs", "1"]


def run(tmp_path, *arguments):
    return command.main(["train", *arguments, "--out", str(tmp_path)])


def settings(**changes):
    return from_flat({"device": "cpu", "augment": "basic", "limit": 128, "batch_size": 32, "epochs": 2, **changes})


def dataset(s):
    return data.load(s.data, None, s.augment).truncated(s.limit)


class Silent:
    def __init__(self, run):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def advance(self, run):
        pass


def test_command(tmp_path, capfd):
    assert (
        run(
            tmp_path,
            "--rule",
            "lls",
            "--model",
            "smallconv",
            "--data",
            "fashion-mnist",
            "--compare",
            "bp",
            *SMALL,
            "--name",
            "first",
        )
        == 0
    )
    folder = tmp_path / "first"
    out, err = capfd.readouterr()
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "results.json",
        "checkpoint.safetensors",
        "checkpoint-bp.safetensors",
        "model.safetensors",
        "model-bp.safetensors",
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["rule"], r["epoch"]) for r in rows] == [("lls", 1), ("lls", 2), ("bp", 1), ("bp", 2)]
    assert len(rows[0]["losses"]) == 5 and len(rows[2]["losses"]) == 1
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = json.loads((folder / "results.json").read_text())["results"]
    assert list(results) == ["lls", "bp"]
    assert results["lls"]["test_accuracy"] == rows[1]["test_accuracy"]
    assert results["lls"]["signal_macs"] == 35_840 and results["bp"]["signal_macs"] == 7_492_608
    assert 0 < results["lls"]["peak_step_bytes"] < results["bp"]["peak_step_bytes"]
    table = out[out.index("rule ") :].splitlines()
    assert re.match(r"lls +\d+\.\d\d % +\d+\.\d +\d+ +\d+\.\d MiB +35\.8 k", table[2])
    assert re.match(r"bp +\d+\.\d\d % +\d+\.\d +\d+ +\d+\.\d MiB +7\.49 M", table[3])
    assert "USDT" not in err and "Warning" not in err
    with pytest.raises(SystemExit):
        command.main(["train", "--help"])
    assert "--bp-lr" in capfd.readouterr().out


@pytest.mark.parametrize("rule", ["lls-m", "lls-mxm", "lls-mxm-reduced", "lls-random", "local-classifier"])
def test_other_rules(tmp_path, rule):
    assert run(tmp_path, "--rule", rule, *TINY, "--name", "r") == 0
    (record,) = map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    assert None not in record["losses"] and 0 <= record["test_accuracy"] <= 1


@pytest.mark.parametrize("rule", [*FEEDBACK, *DIRECT])
def test_rules_without_heads(tmp_path, rule, capsys):
    assert run(tmp_path, "--rule", rule, *SMALL, "--name", "r") == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(None not in record["losses"] and 0 <= record["test_accuracy"] <= 1 for record in rows)
    converted = rule in FEEDBACK
    assert (tmp_path / "r" / "alignment.png").exists() == converted
    for record in rows:
        assert ("alignment" in record) == ("weight_ratio" in record) == converted
        if converted:
            assert list(record["alignment"]) == ["0.0", "1.0", "2.0", "5.0"]
            assert all(0 < angle < 180 for angle in record["alignment"].values())
    if rule == "usf":  # |W| of a uniform law against its root mean square: acos(sqrt(3) / 2) = 30 degrees
        assert all(abs(angle - 30) < 8 for angle in rows[0]["alignment"].values())
    if rule == "fa":
        assert all(abs(angle - 90) < 12 for angle in rows[0]["alignment"].values())


def test_resume_without_feedback_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--rule", "fa", *SMALL, "--name", "a") == 0
    path = tmp_path / "a" / "checkpoint.safetensors"
    state = checkpoint.load(path)
    del state["trainer"]["feedback"]
    checkpoint.save(path, state)
    assert run(tmp_path, "--resume", "--name", "a", "--epochs", "3") == 2
    assert "random feedbacks of this model would be others" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer, amp", [("sgd", "bf16"), ("adam", "fp16"), ("adamw", "none")])
def test_optimizers_and_precisions(tmp_path, optimizer, amp):
    s = settings(optimizer=optimizer, amp=amp, limit=32, batch_size=16, epochs=1)
    for rule in ("lls-m", "bp", "brsf", "dfa", "drtp"):
        (record,) = loop.Run(s, rule, dataset(s), tmp_path / "c").train(Silent, lambda: False)
        assert None not in record["losses"] and record["test_loss"] is not None


def test_it_learns(tmp_path):
    s = settings(limit=512, epochs=3, augment="none")
    for rule in ("lls", "bp"):
        losses = [r["losses"][-1] for r in loop.Run(s, rule, dataset(s), tmp_path / "c").train(Silent, lambda: False)]
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("rule", ["lls-mxm", "bp", "brsf", "sdfa", "drtp"])
@pytest.mark.parametrize("steps", [1, 4, 6])
def test_resume_is_bit_exact(tmp_path, rule, steps):
    s = settings()
    whole = loop.Run(s, rule, dataset(s), tmp_path / "whole")
    records = list(whole.train(Silent, lambda: False))
    first = loop.Run(s, rule, dataset(s), tmp_path / "part")
    with pytest.raises(loop.Interrupted):
        list(first.train(Silent, lambda: first.trainer.steps >= steps))
    torch.manual_seed(99)
    second = loop.Run(s, rule, dataset(s), tmp_path / "part")
    second.load_state_dict(checkpoint.load(second.path))
    assert (second.epoch, second.batch) == {1: (0, 1), 4: (0, 4), 6: (1, 2)}[steps]
    list(second.train(Silent, lambda: False))
    without_time = [
        [{k: v for k, v in r.items() if k != "train_seconds"} for r in history] for history in (records, second.history)
    ]
    assert without_time[0] == without_time[1]
    assert whole.weights.keys() == second.weights.keys()
    assert all(torch.equal(whole.weights[k], second.weights[k]) for k in whole.weights)


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    def accuracy_and_loss(seed):
        s = settings(seed=seed, epochs=1)
        (record,) = loop.Run(s, "lls", dataset(s), tmp_path / "c").train(Silent, lambda: False)
        return record["losses"], record["test_loss"]

    assert accuracy_and_loss(1) == accuracy_and_loss(1) != accuracy_and_loss(2)


def test_ctrl_c_leaves_a_resumable_run(tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "lgkernels",
        "train",
        "--limit",
        "256",
        "--batch-size",
        "32",
        "--epochs",
        "400",
        "--name",
        "stopped",
        "--out",
        str(tmp_path),
        "--threads",
        "1",
    ]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(command.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    end = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < end and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--resume --name stopped --out {tmp_path}" in out and "Traceback" not in err
    epochs = len(metrics.read_text().splitlines())
    state = checkpoint.load(tmp_path / "stopped" / "checkpoint.safetensors")
    assert 1 <= epochs == state["epoch"] < 400
    assert run(tmp_path, "--resume", "--name", "stopped", "--epochs", str(epochs + 1)) == 0
    assert len(metrics.read_text().splitlines()) == epochs + 1


def test_resume_refuses_a_corrupt_checkpoint_and_other_settings(tmp_path, capsys):
    assert run(tmp_path, *SMALL, "--name", "a") == 0
    assert run(tmp_path, *SMALL, "--name", "a") == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert run(tmp_path, "--resume", "--name", "a", "--lr", "0.1") == 2
    assert "--lr 0.1 differs from the run's None" in capsys.readouterr().err
    config, settings = tmp_path / "a" / "config.json", (tmp_path / "a" / "config.json").read_text()
    config.write_text(settings.replace("smallconv", "vgg8"))
    assert run(tmp_path, "--resume", "--name", "a", "--epochs", "3") == 2
    assert "does not fit the run's settings" in capsys.readouterr().err
    config.write_text("[1]")
    assert run(tmp_path, "--resume", "--name", "a") == 2
    assert "config.json holds no settings" in capsys.readouterr().err
    config.write_text(settings)
    path = tmp_path / "a" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert run(tmp_path, "--resume", "--name", "a", "--epochs", "3") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"python -m lgkernels train: error: checkpoint .* corrupt or cut short .*\n", err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rule", "xx"], "unknown rule 'xx'; expected one of: lls, "),
        (["--compare", "bp", "xx"], "unknown rule 'xx'"),
        (["--model", "resnet"], "unknown model 'resnet'; expected one of: smallconv, "),
        (["--model", "resnet18"], "--rule lls needs a model with local heads (smallconv, "),
        (["--model", "alexnet", "--rule", "usf"], "--model alexnet needs images of 63 x 63 or more, those of "),
        (["--data", "imagenet"], "unknown data set 'imagenet'"),
        (["--data", "cifar10"], "data set cifar10 needs --data-dir"),
        (["--data", "mnist", "--data-dir", "/no/such/place"], "data folder /no/such/place does not exist"),
        (["--optimizer", "lion"], "unknown optimizer 'lion'"),
        (["--amp", "int8"], "unknown amp 'int8'"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--seed", "-1"], "--seed must lie in [0, 2**63), got -1"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--limit", "32"], "--batch-size 128 exceeds the 32 training samples"),
        (["--threads", "5000"], f"--threads must be at most {native.MOST_THREADS}, got 5000"),
        (["--device", "toaster"], "--device toaster cannot be used"),
        (["--resume"], "--resume needs --name"),
        (["--resume", "--name", "nothing"], "no run to resume in"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file", *SMALL) == 2
    err = capsys.readouterr().err
    assert "cannot be made" in err and err.count("\n") == 1


def test_missing_extras(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "tqdm" else True)
    assert run(tmp_path) == 2
    assert capsys.readouterr().err == (
        "python -m lgkernels train: error: tqdm not installed; run: "
        'pip install "lgkernels[demo]", in a clone: pip install -e ".[demo]"\n'
    )


def test_missing_pillow(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    assert run(tmp_path, "--data", "cifar10-jpeg", "--data-dir", str(tmp_path)) == 2
    assert "needs Pillow to decode its images: pip install pillow" in capsys.readouterr().err


def test_default_names_do_not_collide(tmp_path):
    for _ in range(2):
        assert run(tmp_path, *TINY) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"fashion-mnist-smallconv-lls", "fashion-mnist-smallconv-lls-2"}


def test_peak_memory_counts_what_lives_at_once():
    def step():
        one = torch.ones(1000)
        two = one + 1
        del one
        return two + 1

    assert 8000 <= measure.peak_memory(step, torch.device("cpu")) <= 8200


def test_table():
    figures = dict(
        test_accuracy=0.91234,
        ms_per_step=12.34,
        samples_per_second=999.6,
        peak_step_bytes=2**21,
        signal_macs=719_000_000,
        train_seconds=61.2,
    )
    lines = report.table({"bp": figures})
    assert lines[2].split() == ["bp", "91.23", "%", "12.3", "1000", "2.0", "MiB", "719", "M", "61", "s"]
    assert len({len(line) for line in lines}) == 1
