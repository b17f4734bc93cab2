"""Local losses of token sequences, and those without labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lgkernels.nn as lnn
from tests.support.problems import randn
from tests.support.tolerances import assert_relative

TOKENS = torch.tensor([[1, 4, 0, 3, 2], [2, 2, 1, 0, 4], [0, 3, 3, 1, 1]])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_one_class_a_token(shift, ignored, final):
    """The cross entropy of each token's classifier; -100 counts nothing."""
    torch.manual_seed(0)
    x, target = randn(3, 5, 6), TOKENS.clone()
    if ignored:
        target[0, 1:3] = -100
    block = nn.Linear(6, 8)
    head = (
        lnn.ClassifierBlock(nn.Sequential(block, nn.Linear(8, 5)), shift=shift)
        if final
        else lnn.LocalClassifier(block, 8, 5, shift=shift)
    )
    twin = copy.deepcopy(head)
    out, loss = head(x, target)
    loss.backward()
    logits = twin.module(x) if final else twin.head(twin.block(x))
    rows, classes = (logits[:, :-1], target[:, 1:]) if shift else (logits, target)
    expected = F.cross_entropy(rows.flatten(0, 1), classes.flatten())
    expected.backward()
    assert out.shape == (3, 5, 5 if final else 8) and not out.requires_grad
    assert_relative("loss", loss, expected, 1e-5)
    for mine, theirs in zip(head.parameters(), twin.parameters(), strict=True):
        assert_relative("gradient", mine.grad, theirs.grad, 1e-4)


def test_a_class_of_a_sequence_is_still_pooled():
    head = lnn.LocalClassifier(nn.Linear(6, 8), 8, 5)
    _, loss = head(randn(3, 5, 6), TOKENS[:, 0])
    logits = head.head(head.block(randn(3, 5, 6)).mean(1))
    assert_relative("loss", loss, F.cross_entropy(logits, TOKENS[:, 0]), 1e-5)


def test_wrong_targets():
    head = lnn.LocalClassifier(nn.Linear(6, 8), 8, 5, shift=True)
    with pytest.raises(ValueError, match=r"target must have shape \(3, 5\) \(one class index per token\), got"):
        head(randn(3, 5, 6), TOKENS[:, :4])
    with pytest.raises(ValueError, match=r"target must hold class indices in \[0, 4\] or ignore_index=-100, got 5"):
        head(randn(3, 5, 6), TOKENS.clone().fill_(5))


@pytest.mark.parametrize("shape, block", [((3, 5, 6), nn.Linear(6, 4)), ((3, 6, 8, 8), nn.Conv2d(6, 4, 3, 2))])
def test_reconstruction(shape, block):
    x = randn(*shape)
    head = lnn.ReconstructionHead(block, 4, 6)
    out, loss = head(x, torch.zeros(3))
    h = block(x)
    decoded = head.decoder(h) if h.dim() == 3 else F.conv2d(h, head.decoder.weight[..., None, None], head.decoder.bias)
    if h.dim() == 4:
        decoded = F.interpolate(decoded, (8, 8), mode="bilinear")
    assert_relative("loss", loss, (decoded - x).square().mean(), 1e-5)
    assert torch.equal(out, h)


def test_reconstruction_of_what_is_no_feature():
    head = lnn.ReconstructionHead(nn.Embedding(5, 4), 4, 6)
    with pytest.raises(TypeError, match="x must be one of float32"):
        head(TOKENS, TOKENS)
    head = lnn.ReconstructionHead(nn.Linear(6, 4), 4, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(3, 5\) \(that of the decoder's output"):
        head(randn(3, 6), TOKENS)


def test_barlow_twins_by_its_sums():
    x = randn(8, 6)
    head = lnn.BarlowTwinsHead(nn.Linear(6, 5), 5, dim=3, off_diagonal=0.1)
    z = head.projection(head.block(x)).double().detach()
    one, two = z[:4], z[4:]
    c = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            a, b = one[:, i], two[:, j]
            a, b = ((v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt() for v in (a, b))
            c[i, j] = (a * b).mean()
    expected = sum(float((1 - c[i, i]) ** 2) for i in range(3))
    expected += 0.1 * sum(float(c[i, j] ** 2) for i in range(3) for j in range(3) if i != j)
    assert_relative("loss", head(x, torch.zeros(4))[1], torch.tensor(expected), 1e-4)
    alike = lnn.BarlowTwinsHead(nn.Identity(), 6, dim=3, off_diagonal=0.0)
    assert alike(torch.cat([x, x]), torch.zeros(8))[1] < 1e-6
    with pytest.raises(ValueError, match="x must have two views of each sample, an even number of rows, got 7"):
        head(x[:7], torch.zeros(4))
