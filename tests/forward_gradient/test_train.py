"""LocalMixer by `python -m lgkernels train`: a run, every rule, and what is measured of them."""

import json

import pytest
import torch

import lgkernels.__main__ as command
import lgkernels.nn as lnn
from lgkernels.recipes import rules, train, variance
from lgkernels.training import ForwardGradientTrainer

RULES = rules.families()["forward_gradient"].RULES


def test_command(tmp_path):
    for needed in train.NEEDED:
        pytest.importorskip(needed)
    arguments = "--rule lg-fg-a --compare lg-bp fg-w --model M/1/16 --data fashion-mnist --draws 2 --noise sign".split()
    sizes = ["--limit", "32", "--batch-size", "16", "--epochs", "1"]
    assert command.main(["train", *arguments, *sizes, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    records = {r["rule"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    assert list(records) == ["lg-fg-a", "lg-bp", "fg-w"]
    assert (folder / "estimator.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    layers = ["block 1, channel", "block 1, group"]
    for record in records.values():
        measures = ["cosine"] + ["variance", "variance_by_formula", "variance_ratio"] * (record["rule"] != "lg-bp")
        assert all(list(record[key]) == layers for key in measures)
    assert "variance" not in records["lg-bp"]
    assert all(value == pytest.approx(1, abs=1e-5) for value in records["lg-bp"]["cosine"].values())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule(rule):
    torch.manual_seed(0)
    task = rules.Task(rule, rule.options(), model="M/4/16", image_size=8)
    (model,) = rule.build(task)
    assert model.config == "M/4/16" and len(model.blocks) == 4
    trainer = rule.trainer([model], lambda p: torch.optim.SGD(p, 0.1), task)
    before = model.blocks[0].channel.weight.detach().clone()
    losses = trainer.step(torch.randn(3, 1, 8, 8), torch.arange(3))
    assert len(losses) == (5 if trainer.kind.local else 1) and losses.isfinite().all()
    # the read-out starts at 0: without a local loss nothing comes back from it at first
    exact = rule.name in ("mixer-bp", "fg-a", "fg-w")
    assert torch.equal(model.blocks[0].channel.weight, before) == exact


class Run:
    """What a measurement takes of `loop.Run`."""

    class settings:
        batch_size = 16

    def __init__(self, estimator, config, **options):
        torch.manual_seed(0)
        model = lnn.LocalMixer(config, image_size=8, in_channels=3, num_classes=5, blocks=2, width=32)
        torch.nn.init.normal_(model.readout.weight, 0, 0.3)
        self.trainer = ForwardGradientTrainer(model, lambda p: torch.optim.SGD(p, 0.1), estimator=estimator, **options)

    def batch_at(self, indices, offset):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 5


@pytest.mark.parametrize(
    "estimator, law, config",
    [
        ("LG-FG-A", "normal", "M/2/4"),
        ("LG-FG-A", "sign", "M/2/4"),
        ("FG-A", "normal", "M/2/4"),
        ("LG-FG-W", "normal", "M/2/4"),
        ("FG-W", "sign", "M/2/1"),
    ],
)
def test_measured_variance_is_that_of_the_formulas(estimator, law, config, monkeypatch):
    monkeypatch.setattr(variance, "DRAWS", 64)
    run = Run(estimator, config, law=law)
    before = {n: t.clone() for n, t in run.trainer.noise.state_dict().items()}
    record = variance.of(run)
    print(record["variance_ratio"])
    # one number makes the gradient of weight noise: its square over 64 draws has a deviation of 0.18
    error = 0.1 if estimator.endswith("A") else 0.4
    for layer, ratio in record["variance_ratio"].items():
        assert abs(ratio - 1) < error, layer
    assert all(torch.equal(t, before[n]) for n, t in run.trainer.noise.state_dict().items())
    assert all(p.grad is None for p in run.trainer.model.parameters())


def test_more_draws_have_a_smaller_variance(monkeypatch):
    monkeypatch.setattr(variance, "DRAWS", 32)
    one, four = (variance.of(Run("LG-FG-A", "M/2/4", draws=draws)) for draws in (1, 4))
    for layer in one["variance"]:
        assert four["variance_by_formula"][layer] == pytest.approx(one["variance_by_formula"][layer] / 4)
        assert four["variance"][layer] == pytest.approx(one["variance"][layer] / 4, rel=0.5)
