"""Objects saved whole (`torch.save(model)`) are loaded again, also those that name a module which has moved since."""

import io
import pickle
import subprocess
import sys

import pytest
import torch

import lgkernels
import lgkernels.nn as lnn
from lgkernels import _moved, functional, optim, training

# Where public names were defined in an earlier tree. When a module moves, its names join this table and
# `lgkernels/_moved.py` tells where they are.
FORMER = {
    "lgkernels.nn.adapter": "LoKrConv2d LoKrLinear LoRALinear adapt merge unmerge",
    "lgkernels.nn.adapter_layers": "LoKrConv2d LoKrLinear LoRALinear",
    "lgkernels.nn.alignment": "alignment weight_ratio",
    "lgkernels.nn.classifier": "ClassifierBlock",
    "lgkernels.nn.convert": "convert feedback_state load_feedback_state redraw_after",
    "lgkernels.nn.direct": "DirectFeedback",
    "lgkernels.nn.feedback": (
        "FeedbackAlignmentConv2d FeedbackAlignmentLinear SignSymmetricConv2d SignSymmetricLinear"
    ),
    "lgkernels.nn.lls": "LLSConvBlock LLSHead LLSLinearBlock",
    "lgkernels.nn.local": (
        "ContrastiveHead ForwardForwardLayer InfoProUnit LocalClassifier PredSimHead infopro_weights"
    ),
    "lgkernels.functional.adapter": "lokr_conv2d lokr_linear lora_linear",
    "lgkernels.functional.feedback": (
        "feedback_conv2d feedback_linear feedback_projection sign_symmetric_conv2d sign_symmetric_linear "
        "target_projection"
    ),
    "lgkernels.functional.lls": "lls_basis lls_loss",
    "lgkernels.functional.local_loss": (
        "goodness_loss info_nce_loss local_cross_entropy nt_xent_loss overlay_label peer_normalization_loss "
        "prediction_similarity_loss similarity_matching_loss supcon_loss"
    ),
    "lgkernels.optim.fused": "FusedUpdate fuse_update",
    "lgkernels.optim.manhattan": "BatchManhattan",
    "lgkernels.optim.offset": "OffsetSGD refresh_due refresh_offsets",
    "lgkernels.optim.offset_wrapper": "OffsetOptimizer",
    "lgkernels.training.backprop": "BackpropTrainer",
    "lgkernels.training.blockwise": "BlockwiseTrainer",
    "lgkernels.training.direct": "DirectTrainer",
    "lgkernels.training.offset": "refresh_trainer",
    "lgkernels.training.partition": "split_blocks",
    "lgkernels.random": "RandomFeedback",
    "lgkernels.recipes.tuning": "ForwardForwardUnit ContrastiveUnit LastUnit Checkpointed AccumulatingTrainer",
}
PLACES = [(module, name) for module, names in FORMER.items() for name in names.split()]


def from_pickle(module, name):
    """What a pickle's GLOBAL opcode gives."""
    return pickle.loads(f"c{module}\n{name}\n.".encode())


@pytest.mark.parametrize("module, name", PLACES)
def test_former_places(module, name):
    found = from_pickle(module, name)
    assert found.__name__ == name
    for package in (lnn, functional, optim, training):
        if module.startswith(package.__name__ + "."):
            assert found is getattr(package, name) and name in package.__all__


def test_a_model_saved_under_a_former_name(monkeypatch):
    """It is loaded by a process that has seen nothing of the library yet."""
    model = torch.nn.Sequential(lnn.LocalClassifier(torch.nn.Linear(3, 4), 4, 2))
    kept = io.BytesIO()
    with monkeypatch.context() as former:
        former.setattr(lnn.LocalClassifier, "__module__", "lgkernels.nn.local")
        torch.save(model, kept)
    code = (
        "import io, sys, torch; model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False); "
        "print(type(model[0]), model[0](torch.ones(1, 3), torch.tensor([1]))[1].item())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=kept.getvalue(), capture_output=True)
    assert not done.returncode, done.stderr.decode()
    assert b"lgkernels.nn.local\n" in kept.getvalue()
    assert done.stdout.decode().split()[-1] == str(model[0](torch.ones(1, 3), torch.tensor([1]))[1].item())
    assert "lgkernels.nn.local_loss.LocalClassifier" in done.stdout.decode()


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'NoSuch' on <module 'lgkernels.nn.local'"):
        from_pickle("lgkernels.nn.local", "NoSuch")
    with pytest.raises(ModuleNotFoundError):
        from_pickle("lgkernels.nn.no_such", "LLSHead")


def test_former_names_load_nothing_by_themselves():
    code = f"import sys, lgkernels; assert not {{'torch', *{sorted(_moved.MOVED)}}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_shows_its_own_names():
    names = {name for name in dir(lgkernels) if not name.startswith("_")}
    inner = {"core", "ops", "recipes"}  # once something has loaded them
    expected = {*lgkernels._SUBMODULES, *lgkernels._FROM_NN, "load_run", "plan"}
    assert names - inner == expected
    assert len(dir(lgkernels)) == len(set(dir(lgkernels)))
    assert all(hasattr(lgkernels, name) for name in expected)
