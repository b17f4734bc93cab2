"""What a run's folder goes through: two commands at once, kills, full disks, closed pipes, signals, wrong files."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys

import pytest
import torch

import lgkernels.__main__ as command
from lgkernels.recipes import checkpoint, data, folders, pictures, session, train
from lgkernels.recipes.options import UsageError

for needed in train.NEEDED:
    pytest.importorskip(needed)
load = pytest.importorskip("safetensors.torch").load

TINY = ["--limit", "32", "--batch-size", "16", "--model", "smallconv", "--rule", "lls"]


def run(out, *arguments):
    return command.main(["train", *arguments, "--out", str(out)])


@pytest.fixture(autouse=True)
def no_measures(monkeypatch):
    """Times and memory of the steps are nobody's subject here."""
    monkeypatch.setattr(session.Session, "_finish", lambda self: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of one run after one epoch and after two."""
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "_finish", lambda self: None)
        assert run(out, *TINY, "--name", "a", "--epochs", "1") == 0
        shutil.copytree(out / "a", out / "first")
        assert run(out, "--resume", "--name", "a", "--epochs", "2") == 0
    return out / "first", out / "a"


@pytest.fixture
def one(made, tmp_path):
    """A copy of that after one epoch, in `tmp_path`."""
    return shutil.copytree(made[0], tmp_path / "a")


@pytest.fixture(scope="module")
def two_epochs(made):
    """The weights after one epoch and after two, as files."""
    return [(folder / "model.safetensors").read_bytes() for folder in made]


def only_line(capsys):
    err = capsys.readouterr().err
    assert err.startswith("python -m lgkernels train: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "/x", "a\\b", "a\nb"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resume"])
def test_names_stay_in_out(tmp_path, capsys, name, more):
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "out", *TINY, "--name", name, *more) == 2
    assert "--name must be the name of a folder under --out, got " in only_line(capsys)
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]


def test_commands_at_once_have_folders_of_their_own(tmp_path):
    with folders.taken(tmp_path, None, "base", False) as one, folders.taken(tmp_path, None, "base", False) as two:
        assert [one.name, two.name] == ["base", "base-2"]
        with pytest.raises(UsageError, match="base-2 is in use by another command"):
            with folders.taken(tmp_path, "base-2", "base", True):
                raise AssertionError
    with folders.taken(tmp_path, "base-2", "base", True) as again:
        assert again == two


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resume"])
def test_a_run_in_use_is_left_alone(tmp_path, capsys, one, more):
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    if not more:
        (tmp_path / "a" / "config.json").unlink()  # as between the folder and the first file
        del files["config.json"]
    handle = os.open(tmp_path / "a", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    capsys.readouterr()
    assert run(tmp_path, *(more or TINY), "--name", "a", "--epochs", "2") == 2
    assert "is in use by another command" in only_line(capsys)
    os.close(handle)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == files


@pytest.mark.parametrize(
    "left", ["checkpoint.safetensors", "model.safetensors", "model-bp.safetensors", "metrics.jsonl"]
)
def test_what_is_left_of_a_run_is_not_written_over(tmp_path, capsys, left):
    """Without --resume, also where config.json is gone."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / left).write_bytes(b"precious")
    (tmp_path / "a" / "notes.txt").write_text("no part of a run")
    assert run(tmp_path, *TINY, "--name", "a", "--epochs", "1") == 2
    assert f"holds {left} of a run without its config.json" in only_line(capsys)
    assert (tmp_path / "a" / left).read_bytes() == b"precious" and len(list((tmp_path / "a").iterdir())) == 2


class Killed(BaseException):
    """As kill -9: nothing is caught, nothing is put in order."""


def test_killed_between_checkpoint_and_weights_file(tmp_path, one, two_epochs, monkeypatch):
    """The checkpoint has the last epoch: a resume gives the weights file it, too, bit for bit, and the picture."""

    def killed(path, title, histories, colour):
        if len(histories["lls"]) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "curves", killed)
        with pytest.raises(Killed):
            run(tmp_path, "--resume", "--name", "a", "--epochs", "2")
    assert checkpoint.load(one / "checkpoint.safetensors")["epoch"] == 2
    assert (one / "model.safetensors").read_bytes() == two_epochs[0]
    (one / ".model.safetensors.next.1.tmp").write_bytes(b"half")
    (one / "curves.png").unlink()
    assert run(tmp_path, "--resume", "--name", "a") == 0
    assert (one / "model.safetensors").read_bytes() == two_epochs[1] != two_epochs[0]
    assert (one / "curves.png").exists() and not list(one.glob(".*"))


@pytest.mark.parametrize("left", ["missing", "cut short"])
def test_a_weights_file_that_was_removed(tmp_path, one, two_epochs, left):
    path = one / "model.safetensors"
    path.write_bytes(two_epochs[0][:1000]) if left == "cut short" else path.unlink()
    assert run(tmp_path, "--resume", "--name", "a") == 0
    now, before = (load(data) for data in (path.read_bytes(), two_epochs[0]))
    assert now.keys() == before.keys()
    for name in (
        n for n in now if "running" not in n and "tracked" not in n
    ):  # a schedule-free optimizer's evaluation mode rounds on the way back
        assert torch.allclose(now[name].double(), before[name].double(), rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("what", ["checkpoint.safetensors", ".model.safetensors.next"])
def test_a_full_disk(tmp_path, capsys, monkeypatch, one, two_epochs, what):
    real, full = os.fsync, [True]

    def fsync(handle):
        if full and f".{what}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    capsys.readouterr()
    before = (one / "checkpoint.safetensors").read_bytes()
    assert run(tmp_path, "--resume", "--name", "a", "--epochs", "2") == 2
    assert only_line(capsys).endswith(f"a/{what} cannot be read or written (No space left on device)\n")
    assert not list((tmp_path / "a").glob(".*.tmp"))
    if what == "checkpoint.safetensors":
        assert (tmp_path / "a" / "checkpoint.safetensors").read_bytes() == before
    full.clear()
    assert run(tmp_path, "--resume", "--name", "a", "--epochs", "2") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == two_epochs[1]


def test_a_closed_pipe(tmp_path, capsys, monkeypatch, two_epochs):
    class Closed:
        def write(self, text):
            if "epoch 1" in text:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            pass

        def fileno(self):
            raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert run(tmp_path, *TINY, "--name", "a", "--epochs", "2") == 1
    assert "nobody reads this output any more" in only_line(capsys)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == two_epochs[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save(tmp_path, capsys, monkeypatch, two_epochs, number):
    steps = []

    def advance(self, run):
        steps.append(run.batch)
        if len(steps) == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(session._Progress, "advance", advance)
        assert run(tmp_path, *TINY, "--name", "a", "--epochs", "2") == 128 + number
    out, err = capsys.readouterr()
    assert "--resume --name a" in out and "stopping after this step" in err and signal.getsignal(number) is before
    assert checkpoint.load(tmp_path / "a" / "checkpoint.safetensors")["batch"] == 1
    assert run(tmp_path, "--resume", "--name", "a") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == two_epochs[1]


def test_ctrl_c_before_the_first_step(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert run(tmp_path, *TINY) == 130
    assert capsys.readouterr().err == "interrupted\n" and not list(tmp_path.iterdir())


def forged(path, change):
    """A checkpoint whose digest is right and whose tree is not."""
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(path, state)


WRONG = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "negative batch": lambda path: forged(path, lambda s: s.update(batch=-1)),
    "epoch": lambda path: forged(path, lambda s: s.update(epoch=7)),
    "rng": lambda path: forged(path, lambda s: s.update(rng=torch.zeros(3))),
    "optimizer": lambda path: forged(path, lambda s: s["trainer"].update(optimizers=[3] * 5)),
}


@pytest.mark.parametrize("damage", WRONG.values(), ids=WRONG)
def test_a_refused_resume_changes_nothing(one, capsys, damage):
    damage(one / "checkpoint.safetensors")
    files = {p.name: p.read_bytes() for p in one.iterdir()}
    capsys.readouterr()
    assert run(one.parent, "--resume", "--name", "a", "--epochs", "9") == 2
    only_line(capsys)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == files


@pytest.mark.parametrize(
    "change",
    [dict(epochs="3"), dict(compare=3), dict(lr=[1]), dict(rule={}), dict(seed=None), dict(data=["x"]), dict(model=1)],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_holds_no_settings(one, capsys, change):
    path = one / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    assert run(one.parent, "--resume", "--name", "a") == 2
    only_line(capsys)
