"""Rules as records: found by their files, offered with their options, known by name nowhere else."""

import ast
import dataclasses
import json
import sys

import pytest
import torch

import lgkernels.__main__ as command
from lgkernels.nn import convert
from lgkernels.recipes import loop, models, options, report, rules, session, settings, train
from lgkernels.recipes.options import UsageError

for needed in train.NEEDED:
    pytest.importorskip(needed)

TINY = ["--limit", "32", "--batch-size", "16", "--epochs", "1"]
TOY = '''
"""A toy: back-propagation whose loss of every step counts for a factor."""

from dataclasses import dataclass

from lgkernels.recipes import models
from lgkernels.recipes.options import option
from lgkernels.recipes.rules import Column, Defaults, Measures, Rule


@dataclass(frozen=True)
class ToyOptions:
    """Of the toy."""

    toy_factor: float = option(0.5, "of its loss")
    toy_words: list[str] = option([], "without meaning")
    toy_loud: bool = option(False, "says so")

    def __post_init__(self):
        if self.toy_factor > 1:
            raise ValueError(f"--toy-factor must be at most 1, got {self.toy_factor}")


def check(settings, options):
    if options.toy_factor == 0.25 and settings.amp != "none":
        raise ValueError("--toy-factor 0.25 is for full precision")


def count(run, order):
    run.counted = getattr(run, "counted", 0) + 1


RULES = (
    Rule(
        "toy-rule",
        lambda task: models.plain(*task.size),
        options=ToyOptions,
        defaults=lambda settings: Defaults("adam", {"adam": 0.125}),
        check=check,
        before_step=count,
        measures=Measures(
            epoch=lambda run: {"counted": run.counted, "factor": run.options.toy_factor},
            end=lambda probe, history, figures: {"toys": history[-1]["counted"]},
            columns=(Column("toys", "toys", str, "toys: how many"),),
        ),
    ),
)
PRESETS = {"toy-preset": {"rule": "toy-rule", "toy_factor": 0.75, "batch_size": 16}}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A family in one new file beside the others."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(folder)])
    forget()
    yield
    sys.modules.pop("lgkernels.recipes.rules.toy", None)
    monkeypatch.undo()
    forget()


def forget():
    rules.families.cache_clear()
    rules.found.cache_clear()


def run(tmp_path, *arguments):
    return command.main(["train", *arguments, "--out", str(tmp_path / "runs")])


def test_a_new_file_is_a_new_rule(tmp_path, toy, capsys):
    arguments = ["--rule", "toy-rule", "--compare", "lls", "--toy-words", "a", "b", "--toy-loud", "--name", "r"]
    assert run(tmp_path, *arguments, *TINY) == 0
    out = capsys.readouterr().out
    assert "adam, learning rate 0.125 (toy-rule), 0.001 (lls)" in out
    table = out[out.index("rule  ") :].splitlines()
    assert table[0].split()[-2:] == ["toys", "training"] and "toys: how many" in out
    assert table[2].split()[0] == "toy-rule" and table[2].split()[-3] == "2"
    folder = tmp_path / "runs" / "r"
    config = json.loads((folder / "config.json").read_text())
    assert config["toy_words"] == ["a", "b"] and config["toy_loud"] is True and config["temperature"] == 0.5
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["rule"], first["counted"], first["factor"]) == ("toy-rule", 2, 0.5)
    assert run(tmp_path, "--rule", "lls", "--compare", "toy-rule", *TINY, "--name", "other") == 0
    assert run(tmp_path, "--resume", "--name", "r", "--epochs", "2") == 0
    assert run(tmp_path, "--resume", "--name", "r", "--toy-factor", "0.25") == 2
    assert "--toy-factor 0.25 differs from the run's 0.5" in capsys.readouterr().err


def test_its_help_and_presets(tmp_path, toy, capsys):
    with pytest.raises(SystemExit):
        command.main(["train", "--help"])
    out = capsys.readouterr().out
    out = out[out.index("options:") :]
    assert "toy-rule" in out[out.index("--rule RULE") : out.index("--compare")]
    assert "toy-rule:\n  Of the toy." in out and "--no-toy-loud" in out
    assert "--toy-factor TOY_FACTOR\n                        of its loss (default: 0.5)" in out
    assert list(rules.found())[-1] == "toy-rule"  # a family without a place of its own stands last
    chosen = settings.complete({"preset": "toy-preset", "device": "cpu", "toy_loud": True})
    made = chosen.options(rules.get("toy-rule"))
    assert (chosen.rule, chosen.batch_size, made.toy_factor, made.toy_loud) == ("toy-rule", 16, 0.75, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rule", "toy-rule", "--toy-factor", "2"], "--toy-factor must be at most 1, got 2.0"),
        (["--rule", "lls", "--toy-factor", "2"], "--toy-factor must be at most 1, got 2.0"),
        (["--rule", "toy-rule", "--toy-factor", "0.25", "--amp", "bf16"], "--toy-factor 0.25 is for full precision"),
        (["--rule", "toy-rule", "--pretrain", "1"], "--pretrain is for bp and forward-forward, "),
        (["--rule", "toy"], "unknown rule 'toy'; expected one of: lls, "),
    ],
)
def test_what_its_options_refuse(tmp_path, toy, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_two_rules_of_one_name(tmp_path, toy):
    (tmp_path / "more" / "copy.py").write_text(TOY)
    forget()
    with pytest.raises(ValueError, match="rule 'toy-rule' of toy has a name that another family's rule has"):
        rules.found()
    sys.modules.pop("lgkernels.recipes.rules.copy", None)


def test_who_knows_no_rule_by_name():
    """Strings of the loop, the command, the session and the report."""
    for module in (loop, train, session, report):
        with open(module.__file__) as file:
            strings = {n.value for n in ast.walk(ast.parse(file.read())) if isinstance(n, ast.Constant)}
        assert not strings & (rules.found().keys() | {rule.python_name for rule in rules.found().values()})


def test_names_are_written_one_way():
    feedback = [rule.python_name for rule in rules.families()["feedback"].RULES]
    assert feedback == ["fa", "usf", "frsf", "brsf", "signed_init"]
    for name in feedback:
        torch.manual_seed(0)
        layer = convert(torch.nn.Linear(3, 2), name, verbose=False, **({"signs": "formula"} if "_" in name else {}))
        assert getattr(layer, "rule", "fa") == name
    for name, rule in rules.found().items():
        assert name == rule.name and "_" not in name and rule.python_name.isidentifier()


def test_every_option_is_of_one_class_and_no_setting():
    found = [f.name for kind in rules.by_options() for f in options.own_fields(kind)]
    common = [f.name for kind in (settings.Settings, settings.Start) for f in options.own_fields(kind)]
    assert len({*found, *common}) == len(found) + len(common)
    for kind in rules.by_options():
        assert dataclasses.is_dataclass(kind) and kind.__doc__.endswith(".")
        kind()  # the defaults are right


def test_heads_take_their_options():
    chosen = settings.from_flat({"temperature": 0.25, "waveform": "cosine"})
    made = chosen.options(rules.get("lls"))
    task = rules.Task(rules.get("lls"), made, "smallconv", 1, 10)
    heads = [block for block in task.rule.build(task) if hasattr(block, "pool_size")]
    assert len(heads) == 4 and all((b.temperature, b.waveform) == (0.25, "cosine") for b in heads)
    with pytest.raises(UsageError, match="--temperature must be positive, got 0"):
        settings.from_flat({"temperature": 0.0})
    with pytest.raises(UsageError, match="--waveform must be one of: square, cosine, got 'saw'"):
        settings.from_flat({"waveform": "saw"})


def test_a_config_holds_the_options_of_its_rules():
    assert "units" not in settings.from_flat({}).flat()
    chosen = settings.from_flat({"rule": "bp", "compare": ["loco-bpm"], "period": 7})
    flat = chosen.flat()
    assert flat["period"] == 7 and flat["units"] == 4 and "temperature" not in flat
    assert settings.from_flat(json.loads(json.dumps(flat))) == dataclasses.replace(
        chosen, rule_options={k: flat[k] for k in settings.from_flat(flat).rule_options}
    )
    assert list(flat)[:3] == ["rule", "compare", "model"]


OLD = {  # config.json as the command wrote it when it held every setting of every rule
    "rule": "loco-bpm", "compare": ["bp"], "model": "resnet-small", "data": "fashion-mnist", "data_dir": None,
    "augment": "none", "image_size": None, "epochs": 1, "batch_size": 16, "lr": None, "bp_lr": None,
    "optimizer": "sgd", "seed": 0, "threads": None, "device": "cpu", "amp": "none", "limit": 32, "pretrain": 0,
    "weights": None, "adapter": None, "units": 3, "overlap": 1, "contrast": "supcon", "batch_norm": None,
    "offset_batch": 16, "offset_chunk": 8, "period": 2, "first_period": None, "local_scale": "1",
    "offset_scale": "0.5", "offset_growth": None, "of_a_rule_that_is_gone": 3,
}  # fmt: skip


def test_a_run_goes_on_by_its_own_line(tmp_path):
    """With an option in it that its rule does not read, too."""
    line = [f"--{k.replace('_', '-')}={v}" for k, v in OLD.items() if v is not None and k not in ("compare",)][:-1]
    line = [*line, "--name", "r"]
    assert run(tmp_path, *line, "--rule", "bp", "--units", "6") == 0
    assert run(tmp_path, *line, "--rule", "bp", "--units", "6", "--resume") == 0


def test_a_run_of_before_goes_on(tmp_path, capsys):
    new = [f"--{k.replace('_', '-')}={v}" for k, v in OLD.items() if v is not None and k not in ("compare",)][:-1]
    assert run(tmp_path, *new, "--compare", "bp", "--name", "r") == 0
    config = tmp_path / "runs" / "r" / "config.json"
    written = json.loads(config.read_text())
    assert {k: v for k, v in OLD.items() if k in written} == written
    assert OLD.keys() - written.keys() == {"of_a_rule_that_is_gone"}
    config.write_text(json.dumps(OLD))
    assert run(tmp_path, "--resume", "--name", "r", "--period", "3") == 2
    assert "--period 3 differs from the run's 2: start a new run for it" in capsys.readouterr().err
    assert run(tmp_path, "--resume", "--name", "r", "--epochs", "2", "--offset-scale", "0.5") == 0
    rows = [json.loads(line) for line in (config.parent / "metrics.jsonl").read_text().splitlines()]
    epochs = [(row["rule"], row["epoch"]) for row in rows]
    assert epochs == [("loco-bpm", 1), ("bp", 1), ("loco-bpm", 2), ("bp", 2)]
    assert "refresh_seconds" in rows[0] and "refresh_seconds" not in rows[1]


def test_rules_that_need_a_network_are_refused_by_name():
    with pytest.raises(ValueError, match="unknown rule 'loco'; expected one of: lls, .*, bp$"):
        models.build("smallconv", "loco", in_channels=1, num_classes=10)
    with pytest.raises(ValueError, match="rule 'lls' needs a model with local heads"):
        models.signal_macs("resnet18", "lls", in_channels=3, num_classes=10, image_size=32)
