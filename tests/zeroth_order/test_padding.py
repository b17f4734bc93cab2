"""The row of an embedding's padding_idx is neither perturbed nor stepped, as torch gives it no gradient."""

import copy

import pytest
import torch
from torch import nn

from lgkernels.optim import ZerothOrder, ZerothOrderLog, replay
from tests.support.tolerances import assert_bit_equal

ROW = 2
TOKENS = torch.tensor([[1, 3, ROW, ROW], [4, 0, 5, ROW]])


class Bag(nn.Module):
    def __init__(self, kind=nn.Embedding, tied=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = kind(6, 4, padding_idx=ROW, dtype=dtype)
        nn.init.normal_(self.table.weight)  # the padding row is not zero
        self.head = nn.Linear(4, 6, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        rows = self.table(tokens)
        return self.head(rows.mean(1) if rows.dim() == 3 else rows)


def row_of(model):
    return model.table.weight.detach()[ROW].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["two-sided", "one-sided", "forward-gradient"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_it_stays(kind, estimator, dtype):
    if kind is nn.EmbeddingBag and (dtype != torch.float32 or estimator == "forward-gradient"):
        return  # torch has no forward-mode derivative of it, and no half of it on all processors
    model = Bag(kind, dtype=dtype)
    start, before = copy.deepcopy(model), row_of(model)
    optimizer = ZerothOrder(model, lr=0.1, eps=0.1, estimator=estimator, members=2, law="sign", weight_decay=0.1)
    for _ in range(4):
        optimizer.step(lambda: model(TOKENS).float().square().mean())
    assert torch.equal(row_of(model), before)
    assert (model.table.weight != start.table.weight).any(1).sum() == 5
    replay(start, ZerothOrderLog.from_bytes(optimizer.log.to_bytes()))
    for (name, p), other in zip(model.named_parameters(), start.parameters()):
        assert_bit_equal(name, other, p)


@pytest.mark.parametrize("read", ["looked up", "whole"])
def test_it_is_not_perturbed(read):
    model, seen = Bag(), []
    optimizer = ZerothOrder(model, lr=0.1, eps=0.5, law="sign", include="table")

    def closure():
        looked = model.table(torch.arange(6)) if read == "looked up" else model.table.weight * 1.0
        seen.append(looked)
        return looked.square().sum()

    before = model.table.weight.detach().clone()
    optimizer.step(closure)
    for table in seen:
        assert torch.equal(table[ROW], before[ROW])
        assert (table != before).any(1).sum() == 5


def test_a_weight_that_is_another_layers_too():
    """The head gives the row a gradient."""
    model = Bag(tied=True)
    before = row_of(model)
    ZerothOrder(model, lr=0.1, law="sign").step(lambda: model(TOKENS).square().mean())
    assert not torch.equal(row_of(model), before)


def test_a_log_without_such_rows_moves_them_as_it_did():
    model = Bag()
    optimizer = ZerothOrder(model, lr=0.1, law="sign")
    optimizer.step(lambda: model(TOKENS).square().mean())
    optimizer.log.kept_rows = {}
    data, before = optimizer.log.to_bytes(), row_of(model)
    assert b"kept_rows" not in data
    assert not torch.equal(row_of(replay(model, ZerothOrderLog.from_bytes(data))), before)
