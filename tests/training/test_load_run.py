"""The way back, and what a run's rules share: optimizer, rates, colours."""

import pytest
import torch

import lgkernels
import lgkernels.__main__ as command
from lgkernels.recipes import loop, optimizers, pictures, session, settings, train

for needed in train.NEEDED:
    pytest.importorskip(needed)


@pytest.mark.parametrize("rule, other", [("lls", "dfa"), ("loco", None)])
def test_load_run(tmp_path, monkeypatch, rule, other):
    monkeypatch.setattr(session.Session, "_finish", lambda self: None)
    seen = {}
    real = loop.Run._evaluate

    def evaluate(self):
        record = real(self)
        x, _ = next(self.dataset.test_batches(8))
        self.trainer.eval()
        seen[self.rule.name] = x, record, self.trainer.predict(x)
        self.trainer.train()
        return record

    monkeypatch.setattr(loop.Run, "_evaluate", evaluate)
    model = ["--model", "resnet-small"] if rule == "loco" else []
    arguments = ["--limit", "32", "--batch-size", "16", "--epochs", "1", "--name", "a", "--out", str(tmp_path)]
    compare = ["--compare", other] if other else []
    assert command.main(["train", "--rule", rule, *compare, *model, *arguments]) == 0
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name in filter(None, (rule, other)):
        network = lgkernels.load_run(tmp_path / "a", None if name == rule else name)
        x, record, logits = seen[name]
        assert not network.training and torch.allclose(network(x), logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="rule must be one of the run's, "):
        lgkernels.load_run(tmp_path / "a", "usf")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.safetensors holds no weights"):
        lgkernels.load_run(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="no run to resume in"):
        lgkernels.load_run(tmp_path)


@pytest.mark.parametrize(
    "rule, optimizer", [("lls", "adamw-schedule-free"), ("bp-accumulate", "adamw-schedule-free"), ("loco", "sgd")]
)
def test_a_fair_race(rule, optimizer):
    """Rivals of bp have its optimizer and rate; a rule that is compared changes nothing of the run's own."""
    compare = [name for name in ("bp", "bp-accumulate", "bp-checkpoint", "loco") if name != rule]
    model = "smallconv" if rule == "lls" else "resnet-small"
    chosen = settings.complete({"rule": rule, "compare": compare, "model": model})
    assert chosen.optimizer == optimizer
    rates = {r.name: optimizers.learning_rate(chosen, r) for r in chosen.rules}
    assert len({rates[name] for name in rates if name.startswith("bp")}) == 1
    given = settings.complete({"rule": "lls", "compare": ["bp", "bp-checkpoint"], "bp_lr": 0.25, "lr": 0.5})
    assert [optimizers.learning_rate(given, r) for r in given.rules] == [0.5, 0.25, 0.25]


def test_what_is_not_usual_is_said():
    chosen = settings.complete({"rule": "bp", "compare": ["loco"], "model": "resnet-small"})
    assert chosen.notes() == ["all rules take adamw-schedule-free, where loco's is sgd: --optimizer sets it for all"]
    chosen = settings.complete({"rule": "loco", "compare": ["bp"], "model": "resnet-small"})
    assert chosen.notes() == ["sgd is the usual optimizer of loco, and all rules take it"]
    assert not settings.complete({"rule": "lls", "compare": ["bp", "bp-accumulate"]}).notes()


@pytest.mark.parametrize("count", [2, 4, 8])
def test_pictures(tmp_path, count, monkeypatch):
    """One colour a rule in every picture, a legend outside of the plots, and room for all rules."""
    rules = ["usf", "bp", "frsf", "brsf", "fa", "dfa", "sdfa", "drtp"][:count]
    record = dict(test_accuracy=0.5, train_accuracy=0.5, losses=[None], angle={"first": 80.0, "second": None})
    histories = {rule: [dict(record, epoch=e) for e in (1, 2)] for rule in rules}
    colour, figures = pictures.colours(rules), []
    assert len(set(colour.values())) == count and colour["bp"] == "black"
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    pictures.curves(tmp_path, "t", histories, colour)
    assert pictures.layers(tmp_path, "t", {r: histories[r] for r in rules[:2]}, {"angle": "degrees"}, colour)
    assert not pictures.layers(tmp_path, "t", histories, {"ratio": ""}, colour)
    curves, layers = figures
    for panel in curves.axes:
        assert [line.get_color() for line in panel.lines] == [colour[rule] for rule in rules]
        assert panel.get_legend() is None and len(panel.lines) == count
    assert [text.get_text() for text in curves.legends[0].get_texts()] == rules
    assert [panel.title.get_color() for panel in layers.axes] == [colour[rule] for rule in rules[:2]]
    assert [text.get_text() for text in layers.axes[0].get_legend().get_texts()] == ["first", "second"]


def test_script():
    from pathlib import Path

    text = (Path(lgkernels.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'lgkernels = "lgkernels.__main__:main"' in text and callable(command.main)
