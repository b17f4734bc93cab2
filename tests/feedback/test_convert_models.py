"""`convert` on the models of torchvision and timm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from lgkernels.core import optional
from tests.feedback.common import randn
from tests.feedback.test_convert import converted, quiet


@pytest.fixture(scope="module")
def torchvision():
    try:
        return optional.torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


MODELS = {"resnet18": (20, 1), "alexnet": (7, 1), "vit_b_16": (25, 25)}  # layers converted, layers left alone


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", MODELS)
def test_torchvision_classifiers(torchvision, name, capsys):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=4)
    model.train()
    exact = copy.deepcopy(model).eval()
    lnn.convert(model, "usf")
    text = capsys.readouterr().out
    assert (len(converted(model)), text.split("left alone\n")[1].count("\n")) == MODELS[name]
    size = 224 if name == "vit_b_16" else 64
    data = randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model.eval()(data), exact(data))
    model.train()
    F.cross_entropy(model(data), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    quiet(model, "bp")
    assert repr(model) == repr(exact.train())


def test_layers_whose_forward_is_never_called(torchvision, capsys):
    """torchvision's shifted-window attention reads the weights of its layers itself."""
    attention = torchvision.models.swin_transformer.ShiftedWindowAttention(8, [2, 2], [0, 0], 2)
    lnn.convert(nn.Sequential(attention, nn.Linear(8, 8)), "usf", last_layer="convert")
    assert type(attention.qkv) is nn.Linear and type(attention.proj) is nn.Linear
    assert capsys.readouterr().out.count("its forward is never called") == 2


@pytest.mark.unpoisoned
def test_torchvision_retinanet(torchvision):
    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    quiet(model, "usf")
    assert len(converted(model)) == 70  # of 71: the last is the box regression's
    boxes = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}]
    losses = model([torch.rand(3, 64, 64)], boxes)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_qkv_with_a_bias_beside_it(torchvision, capsys):
    attention = pytest.importorskip("timm").models.beit.Attention(8, num_heads=2, qkv_bias=True)
    lnn.convert(nn.Sequential(attention, nn.Linear(8, 8)), "usf", last_layer="convert")
    assert type(attention.qkv) is nn.Linear and isinstance(attention.proj, lnn.SignSymmetricLinear)
    assert "0.qkv  Linear: its forward is never called" in capsys.readouterr().out


@pytest.mark.unpoisoned
def test_timm(torchvision):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for name, size in (("vit_tiny_patch16_224", 224), ("convnext_atto", 64)):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=4)
        quiet(model, "frsf")
        assert len(converted(model)) > 20  # timm's attention calls its qkv and proj layers: they are converted
        F.cross_entropy(model(randn(2, 3, size, size)), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
