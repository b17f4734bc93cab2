"""`convert`, `feedback_state`, `load_feedback_state`: whole models under a rule and back."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels.optim import fuse_update
from tests.feedback.common import randn
from tests.support.tolerances import assert_relative

RULES = ("fa", "usf", "frsf", "brsf", "signed_init")
CLASSES = (lnn.SignSymmetricLinear, lnn.SignSymmetricConv2d, lnn.FeedbackAlignmentLinear, lnn.FeedbackAlignmentConv2d)


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )


def x(batch=2):
    return randn(batch, 3, 8, 8)


def quiet(model, rule, **options):
    if rule == "signed_init":
        options = {"signs": "weight", **options}
    return lnn.convert(model, rule, verbose=False, **options)


def converted(model):
    return [name for name, m in model.named_modules() if isinstance(m, CLASSES)]


def gradients(model, data):
    model.zero_grad()
    F.cross_entropy(model(data), torch.arange(len(data)) % 4).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# -- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_the_same_objects_and_bits(rule):
    model = network()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    output = model.eval()(x())
    assert quiet(model, rule) is model and converted(model) == ["0", "3", "5"]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])
    assert torch.equal(model(x()), output)
    network().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("rule", RULES)
def test_only_what_lies_below_a_converted_layer_learns_otherwise(rule):
    """The last converted layer's own gradients, and all above, are those of back-propagation."""
    exact, got = gradients(network(), x()), gradients(quiet(network(), rule), x())
    for name in exact:
        above = int(name.split(".")[0]) >= 5
        assert torch.equal(got[name], exact[name]) == above, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("again", RULES)
def test_there_and_back(rule, again):
    """From any rule to any other, and to torch's own classes without a trace."""
    plain, model = network(), network()
    quiet(quiet(model, rule, last_layer="convert"), again, last_layer="convert")
    once = quiet(network(), again, last_layer="convert")
    for a, b in zip(gradients(model, x()).values(), gradients(once, x()).values()):
        assert torch.equal(a, b)
    assert quiet(model, "bp") is model and not converted(model)
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs) and set(vars(ours)) == set(vars(theirs)) and repr(ours) == repr(theirs)
        assert list(ours._buffers) == list(theirs._buffers) and list(ours._modules) == list(theirs._modules)
    for a, b in zip(gradients(model, x()).values(), gradients(plain, x()).values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3)], ids=["linear", "conv"])
def test_a_bare_layer(rule, layer):
    layer = copy.deepcopy(layer)
    assert quiet(layer, rule) is layer and isinstance(layer, CLASSES)
    assert type(quiet(layer, "bp")) in (nn.Linear, nn.Conv2d)


@pytest.mark.parametrize("rule", RULES)
def test_shared_modules_stay_shared(rule):
    shared = nn.Linear(6, 6)
    model = quiet(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "last": nn.Linear(6, 2)}), rule)
    assert model["a"] is model["b"][0] is shared and isinstance(shared, CLASSES)
    assert len(lnn.feedback_state(model)["feedback"]) == (0 if rule == "usf" else 1)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].weight = model[0].weight
    quiet(model, "frsf")
    assert model[1].weight is model[0].weight
    model(randn(3, 6)).sum().backward()


def test_nothing_converted_is_said():
    """Also with verbose=False: the model would train by back-propagation."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="(?s)no layer is under rule='usf': .*0  ParametrizedLinear"):
        lnn.convert(model, "usf", verbose=False)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_dtype(rule, dtype):
    model = quiet(network().to(dtype), rule)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(m.state.dtype == torch.int64 for m in model.modules() if hasattr(m, "state"))
    if dtype != torch.float16:
        assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(model, x().to(dtype)).values())


@pytest.mark.parametrize("rule", RULES)
def test_random_state_is_made_on_the_layers_device(rule):
    model = quiet(network().to("meta"), rule)
    assert {b.device.type for b in model.buffers()} == {"meta"}


def test_hooks_requires_grad_and_mode_stay():
    model, calls = network(), []
    model[5].register_forward_hook(lambda *_: calls.append(1))
    model[3].weight.requires_grad_(False)
    model.eval()
    quiet(model, "frsf")
    model(x())
    assert calls == [1] and not model[3].weight.requires_grad and not model[5].training


def test_an_optimizer_goes_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rule in ("usf", "bp", "fa"):
        quiet(model, rule)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(model(x()), torch.tensor([0, 1])).backward()
        optimizer.step()
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


# -- which layers ---------------------------------------------------------------------------------------------------


def test_last_layer():
    assert converted(quiet(network(), "usf")) == ["0", "3", "5"]
    assert converted(quiet(network(), "usf", last_layer="convert")) == ["0", "3", "5", "7"]
    assert converted(quiet(network(), "usf", include="[0-5]")) == ["0", "3", "5"]  # the last of the model, not of those


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(include="5"), ["5"]),
        (dict(include=["0", "5"]), ["0", "5"]),
        (dict(exclude="3"), ["0", "5"]),
        (dict(include=nn.Conv2d), ["0", "3"]),
        (dict(exclude=[nn.Linear, "3"]), ["0"]),
        (dict(include=[]), []),
        (dict(include=lambda name, m: getattr(m, "bias", None) is None), ["0"]),
        (dict(include="[03]", exclude="0"), ["3"]),
    ],
)
def test_include_and_exclude(options, expected):
    assert converted(quiet(network(), "usf", **options)) == expected


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_summary_says_what_and_why(capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.scaled, self.conv1d, self.lazy = Scaled(8, 8), nn.Conv1d(3, 3, 1), nn.LazyLinear(3)
            self.norm, self.skip, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)

    model = lnn.convert(Model(), "usf", exclude="skip")
    text = capsys.readouterr().out.splitlines()
    rule = "bias=True, rule='usf', scale='kaiming'"
    assert text[:4] == [
        "usf: 2 layers converted",
        f"  encoder.linear1  SignSymmetricLinear(in_features=8, out_features=16, {rule})",
        f"  encoder.linear2  SignSymmetricLinear(in_features=16, out_features=8, {rule})",
        "left alone",
    ]
    reasons = {line.split()[0]: line.split(": ", 1)[1] for line in text[4:]}
    assert reasons == {
        "embed": "no feedback rule for this kind of layer",
        "encoder.self_attn": "attention's in_proj is a bare parameter, read inside torch's fused function",
        "encoder.self_attn.out_proj": "attention's out_proj: its forward is never called, torch's fused function "
        "reads its weight",
        "scaled": "a subclass of nn.Linear with its own behaviour",
        "conv1d": "no feedback rule for this kind of layer",
        "lazy": "not yet initialised: run a batch through the model first",
        "skip": "in exclude",
        "head": "the last layer (last_layer='bp')",
    }
    assert type(model.scaled) is Scaled and type(model.encoder.self_attn.out_proj) is not nn.Linear
    lnn.convert(network(), "brsf")
    assert "redraw_after(optimizer, model)" in capsys.readouterr().out
    quiet(network(), "usf")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rule", RULES)
def test_transformer_layer(rule):
    """Defect 3's case: 3-D inputs; in evaluation torch's fast path goes on reading the same weights."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = quiet(copy.deepcopy(plain), rule)
    assert converted(model) == ["linear1"]  # linear2 is the last
    data = randn(2, 5, 8)
    assert_relative("train", model(data), plain(data), 1e-6)
    model(data).sum().backward()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_relative("eval", model.eval()(data), plain.eval()(data), 1e-6)


# -- seeds, streams, state ------------------------------------------------------------------------------------------


def feedbacks(model):
    return {name: m.feedback_weight().abs() for name, m in model.named_modules() if isinstance(m, CLASSES)}


def test_streams_depend_on_the_name_alone():
    """Not on the order, nor on what else is converted, nor on the wrappers around the model."""
    whole, part = feedbacks(quiet(network(), "frsf")), feedbacks(quiet(network(), "frsf", include="5"))
    assert torch.equal(whole["5"], part["5"])
    model = nn.DataParallel(network())
    assert torch.equal(feedbacks(quiet(model, "frsf"))["module.5"], whole["5"])
    assert not torch.equal(feedbacks(quiet(network(), "frsf", seed=1))["5"], whole["5"])
    same_shape = quiet(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "fa")
    assert not torch.equal(same_shape[0].feedback_weight(), same_shape[1].feedback_weight())


@pytest.mark.parametrize("rule", RULES)
def test_state_round_trip(rule, tmp_path):
    """A resumed model has the feedback of the saved one, also after brSF's steps; without the state it has not."""
    model = quiet(network(), rule, seed=9)
    for m in model.modules():
        if hasattr(m, "advance"):
            m.advance()
    torch.save({"model": model.state_dict(), "feedback": lnn.feedback_state(model)}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed = network()
    with torch.no_grad():
        for p in resumed.parameters():
            p.neg_()
    quiet(resumed, rule)
    resumed.load_state_dict(saved["model"])
    if rule != "usf":
        assert not all(
            torch.equal(a, b) for a, b in zip(gradients(resumed, x()).values(), gradients(model, x()).values())
        )
    lnn.load_feedback_state(resumed, saved["feedback"])
    for a, b in zip(gradients(resumed, x()).values(), gradients(model, x()).values()):
        assert torch.equal(a, b)


def test_state_is_24_bytes_or_one_bit_a_weight():
    """The stream, CRC-32 of the layer's name, is frozen: an old checkpoint must mean the same."""
    state = lnn.feedback_state(quiet(network(), "frsf", seed=2))
    assert state["law_version"] == 2 and set(state["feedback"]) == {"0.feedback", "3.feedback", "5.feedback"}
    assert state["feedback"]["5.feedback"] == dict(
        seed=2, stream=2226203566, step=0, law="uniform8", scale=pytest.approx(1 / 288**0.5), low=0.0
    )
    packed = lnn.feedback_state(quiet(network(), "signed_init"))["feedback"]["5"]["frozen_signs"]
    assert packed.shape == (16, 9) and packed.dtype == torch.int32


def test_state_of_another_model_is_refused():
    model = quiet(network(), "frsf")
    good = lnn.feedback_state(model)
    before = lnn.feedback_state(model)

    def change(**changes):
        state = copy.deepcopy(good)
        state["feedback"]["5.feedback"].update(changes)
        return state

    missing = copy.deepcopy(good)
    del missing["feedback"]["5.feedback"]
    for state, message in (
        (None, "state must be a dict from feedback_state, got None: resumed without it, the 3 random feedbacks"),
        ([], "state must be a dict from feedback_state, got list"),
        ({**good, "law_version": 0}, "state must have law version 2, got 0"),
        ({**change(low=0.01), "law_version": 1}, "state must have law version 2, got 1"),
        (missing, r"only in the model: \['5.feedback'\]"),
        (change(law="normal"), "state must have the model's feedback at '5.feedback', got law=normal"),
        (change(scale=0.5), "got scale=0.5, the model has "),
    ):
        with pytest.raises(ValueError, match=message):
            lnn.load_feedback_state(model, state)
    assert lnn.feedback_state(model) == before
    lnn.load_feedback_state(model, {**good, "law_version": 1})  # low = 0: the matrices are the same
    lnn.load_feedback_state(model, change(seed=7, step=4))
    assert model[5].feedback.state.tolist()[0::2] == [7, 4]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (
            ("sf",),
            {},
            ValueError,
            "rule must be one of 'bp', 'fa', 'usf', 'frsf', 'brsf', 'signed_init', 'dfa', 'lls', got 'sf'",
        ),
        (("usf",), dict(last_layer="plain"), ValueError, "last_layer must be one of 'bp', 'convert', got 'plain'"),
        (
            ("usf",),
            dict(include=3),
            TypeError,
            "include must hold name patterns, module classes or functions (name, module) -> bool, got int",
        ),
        (
            ("usf",),
            dict(include=[3]),
            TypeError,
            "include must hold name patterns, module classes or functions (name, module) -> bool, got int",
        ),
        (("bp",), dict(scale=1.0), TypeError, "options must be empty with rule='bp', got ['scale']"),
        (
            ("usf",),
            dict(scale="big"),
            ValueError,
            "scale must be one of 'kaiming', 'xavier', 'inv_sqrt_fan_in', 'he_fan_out', 'he_fan_in', got 'big'",
        ),
        (
            ("usf",),
            dict(law="uniform"),
            ValueError,
            "law must be None with rule='usf' (it has no random magnitudes), got 'uniform'",
        ),
        (
            ("frsf",),
            dict(law="cauchy"),
            ValueError,
            "law must be one of 'uniform', 'normal', 'uniform8', 'sign', got 'cauchy'",
        ),
        (
            ("usf",),
            dict(packed_signs=True),
            ValueError,
            "sign_zero must be 'plus' with packed_signs=True (one bit cannot hold sign(0) = 0), got 'zero'",
        ),
        (("fa",), dict(feedback_init=-1.0), ValueError, "feedback_init must be greater than 0, got -1.0"),
        (("frsf",), dict(seed=1.5), TypeError, "seed must be an int, got float"),
    ],
    ids=str,
)
def test_bad_options_leave_the_model_alone(arguments, options, error, message):
    model = network()
    with pytest.raises(error) as caught:
        quiet(model, *arguments, **options)
    assert str(caught.value) == message and not converted(model)
    assert all(set(vars(a)) == set(vars(b)) for a, b in zip(model.modules(), network().modules()))


@pytest.mark.parametrize(
    "rule, option",
    [
        ("usf", "bias"),
        ("usf", "padding"),
        ("usf", "dtype"),
        ("usf", "stream"),
        ("usf", "device"),
        ("fa", "device"),
        ("fa", "stride"),
        ("fa", "sign_zero"),
        ("usf", "feedback_init"),
    ],
)
def test_only_the_rules_options_are_taken(rule, option):
    """bias=, padding=, ... of the layer's constructor are none: the layer keeps its own."""
    model = network()
    with pytest.raises(TypeError, match=f"options of rule='{rule}' must be among .*law.*impl, got {option}: all else"):
        quiet(model, rule, **{option: 1})
    assert not converted(model)


def test_signed_init_needs_a_choice_of_signs():
    for options in ({}, {"signs": "w"}):
        model = network()
        with pytest.raises(ValueError, match="signs must be 'formula' .* or 'weight' .*, got (None|'w')"):
            lnn.convert(model, "signed_init", **options)
        assert not converted(model)
    plain, model = network(), quiet(network(), "signed_init", signs="formula")
    for a, b in ((plain[3].weight, model[3].weight), (plain[5].weight, model[5].weight)):
        assert torch.equal(a.abs(), b.abs()) and not torch.equal(a, b)
    assert torch.equal(model[5].weight.sign(), model[5].feedback_weight().sign())
    assert sum(b.nbytes for m in model[:7] for b in m.buffers() if b.dtype == torch.int64 and b.numel() > 1) == 3 * 24
    with pytest.raises(ValueError, match="sign_weight is for rule='signed_init' with signs by formula, got"):
        quiet(network(), "signed_init")[0].sign_weight()


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = network()
    fused = fuse_update(model, torch.optim.SGD(model.parameters(), lr=0.1), include=["5"])
    for rule in ("usf", "bp"):
        with pytest.raises(ValueError, match="layer '5' has a forward of its own, set on the instance, .*remove"):
            quiet(model, rule)
        assert not converted(model)
    assert converted(quiet(model, "usf", exclude="5")) == ["0", "3"]
    fused.remove()
    assert converted(quiet(model, "usf")) == ["0", "3", "5"]


def test_the_last_layer_comes_back(capsys):
    """Converted once, with last_layer="convert", it has its exact gradient again where the next convert says so."""
    model = quiet(network(), "usf", last_layer="convert")
    lnn.convert(model, "frsf")
    assert converted(model) == ["0", "3", "5"] and "7  Linear: the last layer" in capsys.readouterr().out
    for a, b in zip(gradients(model, x()).values(), gradients(quiet(network(), "frsf"), x()).values()):
        assert torch.equal(a, b)
    quiet(model, "usf", last_layer="convert")
    assert converted(quiet(model, "frsf", exclude="7")) == ["0", "3", "5", "7"] and model[7].rule == "usf"


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=float("inf")),
        dict(scale=float("nan")),
        dict(seed="a"),
        dict(seed=2**64),
        dict(impl="gpu"),
        dict(scale="1"),
    ],
)
def test_options_out_of_range(options):
    model = network()
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))} must be"):
        quiet(model, "usf", **options)
    assert not converted(model)
    assert quiet(model, "usf", scale=np.float32(0.5))[0].factor == 0.5


def test_symbolic_trace_is_refused_by_name():
    with pytest.raises(TypeError, match="got a Proxy of torch.fx.symbolic_trace, .*: use torch.export"):
        torch.fx.symbolic_trace(quiet(network(), "usf"))


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        lnn.convert({}, "usf")


# -- fine-tuning, and other people's models -------------------------------------------------------------------------


def test_fine_tuning_a_trained_network_keeps_its_accuracy():
    torch.manual_seed(0)
    centres = torch.randn(4, 3, 8, 8)
    labels = torch.randint(0, 4, (256,))
    data = centres[labels] + 2.0 * torch.randn(256, 3, 8, 8)
    model = network()

    def train(steps, lr):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for step in range(steps):
            batch = slice(64 * (step % 4), 64 * (step % 4) + 64)
            optimizer.zero_grad()
            F.cross_entropy(model(data[batch]), labels[batch]).backward()
            optimizer.step()
        return (model(data).argmax(1) == labels).float().mean().item()

    before = train(12, 0.02)
    assert 0.5 < before
    quiet(model, "usf")
    assert train(12, 0.005) >= before


def test_convert_and_its_instruments_are_at_the_top():
    import lgkernels

    assert lgkernels.convert is lnn.convert and lgkernels.alignment is lnn.alignment
    assert {"convert", "feedback_state", "load_feedback_state", "weight_ratio"} <= set(dir(lgkernels))


def test_repr_shows_no_empty_entry():
    assert "None" not in repr(nn.Sequential(lnn.SignSymmetricLinear(3, 2), lnn.SignSymmetricConv2d(3, 2, 1)))


@pytest.mark.parametrize("rule, options", [("fa", {}), ("frsf", {}), ("signed_init", dict(signs="formula"))])
def test_weights_assigned_to_a_model_on_the_meta_device(rule, options):
    plain, data = network(), randn(2, 3, 8, 8).requires_grad_()
    with torch.device("meta"):
        model = quiet(network(), rule, **options)
    model.load_state_dict(plain.state_dict(), assign=True)
    expected = quiet(plain, rule, **options)
    for m in (model, expected):
        if rule == "signed_init":
            m[0].sign_weight()
    gradients = [torch.autograd.grad(m(data).sum(), data)[0] for m in (model, expected)]
    assert torch.equal(*gradients)


def test_frozen_signs_left_on_the_meta_device():
    layer = lnn.SignSymmetricLinear(3, 4)
    lnn.convert(layer, "signed_init", signs="weight", verbose=False)
    layer.frozen_signs = layer.frozen_signs.to("meta")
    with pytest.raises(ValueError, match="frozen_signs must be on cpu like weight, got meta"):
        layer(torch.ones(1, 3, requires_grad=True))
