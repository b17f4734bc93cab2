"""The variance of forward gradients: the paper's four formulas, on one linear map."""

import pytest
import torch

import lgkernels.functional as LF
from lgkernels.random import RandomFeedback

INPUTS, UNITS, SAMPLES, REPEATS = 6, 5, 8, 40_000


def formula(k, variance, square, *, shared, law):
    """Table 1 of Ren et al.; k: what is perturbed. The law of signs has k and k - 1 in the place of k + 2 and k + 1."""
    first, second = (k + 2, k + 1) if law == "normal" else (k, k - 1)
    return first * variance / SAMPLES + second * square / (1 if shared else SAMPLES)


def linear_map():
    """One layer whose loss is a cross entropy: batches of samples drawn anew, and its weight."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(REPEATS * SAMPLES, INPUTS, generator=generator) + 0.5
    target = torch.randint(3, (len(x),), generator=generator)
    weight, head = torch.randn(UNITS, INPUTS, generator=generator), torch.randn(UNITS, 3, generator=generator)
    return x, weight, head, target


def derivatives(z, z_tangent, head, target):
    """<gradient of a sample's loss, its tangent>, by the library's loss with its tangent."""
    rows = z.view(-1, 1, 1, UNITS), z_tangent.reshape(-1, 1, 1, UNITS)
    return LF.replicated_cross_entropy_dual(*rows, head, torch.zeros(3), target)[1].view(-1)


@pytest.mark.parametrize("law", ["normal", "sign"])
@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
@pytest.mark.parametrize("perturb", ["activities", "weights"])
def test_four_formulas(perturb, shared, law):
    x, weight, head, target = linear_map()
    z = (x @ weight.t()).requires_grad_()
    logits = z @ head
    (gz,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target, reduction="sum"), z)
    z = z.detach()
    exact = torch.einsum("ni,nj->nij", gz.double(), x.double())  # of each sample
    v, s = exact.var(0).mean().item(), exact.mean(0).square().mean().item()
    noises = REPEATS if shared else REPEATS * SAMPLES
    size = UNITS if perturb == "activities" else UNITS * INPUTS
    u = RandomFeedback(3, law=law).materialize((noises, size))
    u = u.repeat_interleave(SAMPLES, 0) if shared else u
    if perturb == "activities":
        along = derivatives(z, u, head, target)
        estimate = torch.einsum("n,ni,nj->nij", along, u, x)
    else:
        u = u.view(-1, UNITS, INPUTS)
        along = derivatives(z, torch.einsum("nij,nj->ni", u, x), head, target)
        if shared:  # the derivative of the batch's mean loss
            along = along.view(-1, SAMPLES).mean(1).repeat_interleave(SAMPLES)
        estimate = along.view(-1, 1, 1) * u
    batches = estimate.view(REPEATS, SAMPLES, UNITS, INPUTS).double().mean(1)
    assert (batches.mean(0) - exact.mean(0)).abs().max() < 6 * batches.std(0).max() / REPEATS**0.5
    predicted = formula(size, v, s, shared=shared, law=law)
    assert batches.var(0).mean().item() == pytest.approx(predicted, rel=0.03)
