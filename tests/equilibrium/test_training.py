"""Nets that settle, their trainer, and the train command's rules."""

import json

import pytest
import torch

import lgkernels.__main__ as command
import lgkernels.functional as LF
import lgkernels.nn as lnn
from lgkernels.recipes import rules, train
from lgkernels.training import EquilibriumTrainer
from lgkernels.training.equilibrium import UnsettledError
from tests.equilibrium.common import CONV, close, golden

RULES = rules.families()["equilibrium"].RULES


def net(**options):
    torch.manual_seed(0)
    return lnn.EquilibriumMLP(6, (8, 7), 5, num_classes=3, steps=40, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def batch(samples=9):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(samples, 6, generator=generator), torch.arange(samples) % 3


@pytest.mark.parametrize("name", ["mlp_a30_f64", "loop_f64", CONV])
def test_the_authors_gradients_reach_the_optimizer(name):
    data = golden(name)
    options = dict(activation=data.activation, steps=data.meta["T1"], num_classes=5, dtype=torch.float64)
    if name == CONV:
        model = lnn.EquilibriumConvNet(3, data.meta["ch"], **options)
    else:
        topology = "loop" if name.startswith("loop") else "chain"
        model = lnn.EquilibriumMLP(11, (16, 12), 6, topology=topology, **options)
    assert sorted(model.named_weights()) == sorted(data.weights)
    model.load_weights(data.weights)
    own = dict(points=2, beta=data.meta["beta"], nudge_steps=data.meta["T2"])
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 1.0), **own)
    loss = trainer.step(data.x, data.y.argmax(1))
    moved = {k: data.weights[k] - w.detach() for k, w in model.named_weights().items()}
    close("step", moved, data.group("hep_grad_N2"), 1e-9)
    if data.has("logits"):
        close("logits", {"": trainer.output}, {"": data["logits"]})
        torch.testing.assert_close(loss[0], data["loss_mean"])


@pytest.mark.parametrize("method", ["holomorphic", "continuous", "recurrent_backprop"])
def test_methods_agree_where_the_weights_are_symmetric(method):
    x, target = batch()
    make = lambda method, points: EquilibriumTrainer(  # noqa: E731
        net(), sgd, method=method, points=points, beta=0.1, nudge_steps=60
    )
    _, exact, _ = make("holomorphic", 0).gradients(x, target)
    _, gradients, report = make(method, 4).gradients(x, target)
    tolerance = 0.02 if method == "continuous" else 2e-3  # the mean state of a round is not the free one
    close(method, gradients, exact, tolerance, dict.fromkeys(exact, 0.02))
    assert report == []


def test_homeostasis_is_added_and_turns_the_weights():
    x, target = batch()
    plain = EquilibriumTrainer(net(angle=90), sgd).gradients(x, target)[1]
    model = net(angle=90)
    trainer = EquilibriumTrainer(model, sgd, homeostasis=2.0, estimator="exact")
    losses, gradients, _ = trainer.gradients(x, target)
    weights = {k: w.detach().requires_grad_() for k, w in model.named_weights().items()}
    loss = LF.homeostatic_loss(weights, model.activities(model.settle(x)), estimator="exact")
    loss.backward()
    assert losses.shape == (2,) and torch.equal(losses[0], loss.detach())
    for key, w in weights.items():
        torch.testing.assert_close(gradients[key], plain[key] + (0 if w.grad is None else 2 * w.grad))
    trainer = EquilibriumTrainer(model, sgd, homeostasis=20.0)
    before = LF.weight_angle(model.named_weights())
    for _ in range(10):
        trainer.step(x, target)
    assert LF.weight_angle(model.named_weights()) < before - 20


@pytest.mark.parametrize("angle", [0.0, 45.0, 90.0])
def test_the_angle_at_the_start(angle):
    torch.manual_seed(0)
    for model in (
        lnn.EquilibriumMLP(4, (200, 200), 200, angle=angle),
        lnn.EquilibriumConvNet(1, (30, 40, 50), angle=angle),
    ):
        assert abs(LF.weight_angle(model.named_weights()) - angle) < 2
    kernel = lnn.EquilibriumMLP(400, (300,), 10).weights["in-l1/kernel"]
    assert abs(kernel.std() * 20 - 1) < 0.02 and kernel.abs().max() <= 2 / 20 / 0.8796


@pytest.mark.parametrize("unsettled", ["skip", "leave_out", "raise"])
def test_unsettled_nudges_are_reported(unsettled):
    x, target = batch()
    x[1:] = 0
    model = net(angle=90)
    with torch.no_grad():
        model.weights["in-l1/kernel"].mul_(100)  # it saturates one sample, and shakes none
        for key in ("l1-l2/kernel", "l2-l1/kernel"):
            model.weights[key].mul_(-6)
    trainer = EquilibriumTrainer(model, sgd, unsettled=unsettled, limit=1e-2)
    before = {k: w.detach().clone() for k, w in model.named_weights().items()}
    if unsettled == "raise":
        with pytest.raises(UnsettledError, match="nudges did not settle: beta="):
            trainer.step(x, target)
    else:
        with pytest.warns(UserWarning, match=r"nudges did not settle: beta=0.5.*, by place \(residual\): "):
            trainer.step(x, target)
    assert trainer.reported == 1
    part = trainer.report[0]
    assert part.phase.startswith("beta=0.5") and part.samples and len(part.samples) < len(x)
    assert len(part.residual) == len(part.samples) and all(not r <= 1e-2 for r in part.residual)
    same = all(torch.equal(w.detach(), before[k]) for k, w in model.named_weights().items())
    assert same == (unsettled != "leave_out")
    assert all(w.isfinite().all() for w in model.weights.values())
    if unsettled == "leave_out":
        _, gradients, report = trainer.gradients(x, target)
        good = sorted(set(range(len(x))) - {sample for part in report for sample in part.samples})
        _, alone, rest = trainer.gradients(x[good], target[good])
        assert report and not rest
        for key in ("l1-l2/kernel", "in-l1/kernel"):
            torch.testing.assert_close(gradients[key] * len(x), alone[key] * len(good), rtol=1e-4, atol=1e-5)


def test_divergence_is_no_number_and_no_update():
    x, target = batch()
    model = net()
    with torch.no_grad():
        model.weights["readout/Dense_0/kernel"].fill_(float("inf"))
    trainer = EquilibriumTrainer(model, sgd)
    with pytest.warns(UserWarning, match="nudges did not settle"):
        trainer.step(x, target)
    assert trainer.report and not model.weights["l1-l2/kernel"].isnan().any()
    with pytest.warns(UserWarning, match="error: 9 samples"):
        EquilibriumTrainer(model, sgd, method="recurrent_backprop").step(x, target)


def energy_net(**options):
    torch.manual_seed(0)
    return lnn.HopfieldNet((6,), (8, 3), steps=20, **options)


def energy_net_with_a_readout():
    return energy_net(num_classes=3, loss="cross_entropy")


METHODS = ("holomorphic", "continuous", "recurrent_backprop")
WATCHED = [(make, method) for make in (net, energy_net, energy_net_with_a_readout) for method in METHODS]
WATCHED = [(make, method) for make, method in WATCHED if make is net or method != "continuous"]


@pytest.mark.parametrize("unsettled", ["skip", "leave_out"])
@pytest.mark.parametrize("make, method", WATCHED)
def test_a_sample_that_is_no_number_teaches_nothing(make, method, unsettled):
    x, target = batch()
    whole, x = x, x.clone()
    x[3, 2] = float("nan")
    model, other = make(), make()
    options = dict(method=method, nudge_steps=15)
    trainer = EquilibriumTrainer(model, sgd, unsettled=unsettled, **options)
    before = {k: w.detach().clone() for k, w in model.weights.items()}
    with pytest.warns(UserWarning, match="did not settle"):
        trainer.step(x, target)
    assert {sample for part in trainer.report for sample in part.samples} == {3} and trainer.reported == 1
    moved = {k: w.detach() - before[k] for k, w in model.weights.items()}
    if unsettled == "skip":
        assert not any(m.any() for m in moved.values())
        return
    good = [0, 1, 2, 4, 5, 6, 7, 8]
    _, alone, report = EquilibriumTrainer(other, sgd, **options).gradients(whole[good], target[good])
    assert report == []
    for key, m in moved.items():
        torch.testing.assert_close(m, -0.1 * alone[key] * 8 / 9, rtol=1e-4, atol=1e-7)
    _, gradients, report = trainer.gradients(x[3:4], target[3:4])
    assert report and not any(g.any() for g in gradients.values())
    before = {k: w.detach().clone() for k, w in model.weights.items()}
    trainer.step(x[3:4], target[3:4])
    assert all(torch.equal(w.detach(), before[k]) for k, w in model.weights.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_net_that_does_not_settle_is_reported(method):
    x, target = batch()
    model = net(angle=90)
    with torch.no_grad():
        for key in ("l1-l2/kernel", "l2-l1/kernel"):
            model.weights[key].mul_(-20)
    report = EquilibriumTrainer(model, sgd, method=method, limit=1e-2).gradients(x, target)[2]
    phases = {"recurrent_backprop": {"free"}}.get(method, {"beta=0.5", "beta=-0.5"})
    assert {part.phase for part in report} == phases and all(part.samples for part in report)


def test_an_energy_net_that_diverges_is_reported_with_gradients_through_time_too():
    x, target = batch()
    model = energy_net()
    with torch.no_grad():
        model.weights["l1-out/kernel"].fill_(1e38)
    trainer = EquilibriumTrainer(model, sgd, method="recurrent_backprop")
    with pytest.warns(UserWarning, match="phases did not settle: free: 9 samples"):
        trainer.step(x, target)
    assert all(w.isfinite().all() for w in model.weights.values())
    model = energy_net_with_a_readout()
    with torch.no_grad():
        model.weights["readout/Dense_0/kernel"].fill_(float("inf"))  # its states settle
    for unsettled in ("skip", "leave_out"):
        trainer = EquilibriumTrainer(model, sgd, method="recurrent_backprop", unsettled=unsettled)
        with pytest.warns(UserWarning, match="error: 9 samples"):
            trainer.step(x, target)
        assert all(w.isfinite().all() for k, w in model.weights.items() if k != "readout/Dense_0/kernel")


@pytest.mark.parametrize("make", [net, energy_net])
@pytest.mark.parametrize("method", ["holomorphic", "recurrent_backprop"])
def test_what_a_step_refuses(make, method):
    x, target = batch()
    trainer = EquilibriumTrainer(make(), sgd, method=method)
    for call in (trainer.step, trainer.gradients, trainer.error):
        with pytest.raises(ValueError, match=r"x must have at least one sample, got shape \(0, 6\)"):
            call(x[:0], target[:0])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside"):
        trainer.step(x, target)


def test_weights_that_are_tied_by_hand_are_refused():
    model = lnn.EquilibriumMLP(6, (5,), 5, num_classes=3)
    model.weights["out-l1/kernel"] = model.weights["l1-out/kernel"]
    with pytest.raises(ValueError, match="got one as weights.(l1-out/kernel and weights.out-l1|out-l1.*l1-out)/kernel"):
        EquilibriumTrainer(model, sgd)


def test_options_of_other_nets_are_refused():
    for options, message in (
        (dict(points=7), "points must be left at 2 for a HopfieldNet, which has none, got 7"),
        (dict(plateaus=3), "plateaus must be left at 20 for a HopfieldNet, which has none, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            EquilibriumTrainer(energy_net(), sgd, **options)
    with pytest.raises(ValueError, match="variant must be left at 'centered' but for a HopfieldNet, got 'positive'"):
        EquilibriumTrainer(net(), sgd, variant="positive")
    for options in (dict(points=4), dict(points=2, method="continuous")):
        with pytest.raises(ValueError, match="activation must be .*, got 'hard_sigmoid'"):
            EquilibriumTrainer(net(activation="hard_sigmoid"), sgd, **options)


@pytest.mark.parametrize("estimator", ["paper", "symmetric", "exact"])
def test_the_homeostatic_loss_of_no_sample(estimator):
    model = net(angle=90)
    r = model.activities(model.settle(batch()[0][:0]))
    with pytest.raises(ValueError, match=r"activities must have at least one sample, got shape \(0, 8\)"):
        LF.homeostatic_loss(model.named_weights(), r, estimator=estimator)


def test_rates_by_layer_and_accumulation():
    x, target = batch(8)
    model, other = net(angle=90), net(angle=90)
    rates = {"in-l1": 25.0, "l1-l2": 2.0}
    trainer = EquilibriumTrainer(model, sgd, rates=rates)
    plain = EquilibriumTrainer(other, sgd, accumulation_steps=2)
    before = {k: w.detach().clone() for k, w in model.named_weights().items()}
    trainer.step(x, target)
    plain.step(x[:4], target[:4])
    plain.step(x[4:], target[4:])
    for key, w in model.named_weights().items():
        factor = {"in-l1": 25.0, "l1-l2": 2.0, "l2-l1": 2.0}.get(key.rpartition("/")[0], 1.0)
        expected = (other.weights[key] - before[key]) * factor
        torch.testing.assert_close(w - before[key], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="rates must name edges of the net, .*, got a dict with 'l1-out'"):
        EquilibriumTrainer(model, sgd, rates={"l1-out": 2.0})


def test_a_state_goes_on():
    x, target = batch()
    one, two = (EquilibriumTrainer(net(angle=90), sgd, homeostasis=0.5) for _ in range(2))
    one.step(x, target)
    two.load_state_dict(one.state_dict())
    for trainer in (one, two):
        trainer.step(x, target)
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        assert torch.equal(a, b)
    assert one.noise.state[2] == two.noise.state[2] == 2  # other noise at every step


def test_squared_error():
    x, target = batch()
    model = lnn.EquilibriumMLP(6, (8,), 3, loss="mse", activation="hard_sigmoid", steps=40)
    trainer = EquilibriumTrainer(model, lambda p: torch.optim.SGD(p, 0.5), points=2, beta=0.2)
    first = trainer.step(x, target)
    for _ in range(20):
        loss = trainer.step(x, target)
    assert trainer.output.shape == (9, 3) and loss < first
    with pytest.raises(ValueError, match="activation must be"):
        EquilibriumTrainer(model, sgd, points=4).step(x, target)


# -- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    for needed in train.NEEDED:
        pytest.importorskip(needed)
    arguments = "--rule hep --compare eq-rbp --model eq-mlp --data fashion-mnist --start-angle 30".split()
    sizes = "--limit 32 --batch-size 16 --epochs 1 --free-steps 10 --nudge-steps 4 --homeostasis 1".split()
    assert command.main(["train", *arguments, *sizes, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    records = {r["rule"]: r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    assert list(records) == ["hep", "eq-rbp"]
    assert (folder / "equilibrium.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for record in records.values():
        assert 25 < record["angle"]["all pairs"] < 45 and 0 < record["symmetry"]["Jacobian"] < 1
        assert list(record["cosine"]) == ["l1", "l2", "out"] and record["reported_batches"] == 0
        shares = list(record["settled"].values())
        assert shares == sorted(shares) and all(0 <= share <= 1 for share in shares)


SIZES = {"eq-conv": 32, "hopfield-conv": 16}


@pytest.mark.parametrize(
    "rule, model", [(rule, model) for rule in RULES for model in rule.models], ids=lambda v: getattr(v, "name", v)
)
def test_every_rule(rule, model):
    size = SIZES.get(model, 4)
    if model == "eq-conv":
        with torch.device("meta"):
            (made,) = rule.build(rules.Task(rule, rule.options(), model=model, image_size=size, in_channels=3))
        assert [w.shape[0] for k, w in made.weights.items() if w.dim() == 4][-1] == 512
        return
    options = rule.options(free_steps=40, nudge_steps=4)
    task = rules.Task(rule, options, model=model, image_size=size)
    (made,) = rule.build(task)
    trainer = rule.trainer([made], sgd, task)
    assert trainer.step(torch.rand(3, 1, size, size), torch.arange(3)).isfinite().all()
    assert trainer.predict(torch.rand(3, 1, size, size)).shape == (3, 10)
