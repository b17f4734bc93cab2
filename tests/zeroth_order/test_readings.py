"""Whatever reads a tuned parameter in a closure reads it perturbed; what cannot is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgkernels.optim import ZerothOrder

EPS = 0.25
READINGS = {
    "type": lambda m, w: w.type(torch.float32),
    "type of a name": lambda m, w: w.type(dtype="torch.FloatTensor"),
    "type_as": lambda m, w: w.type_as(torch.ones(1)),
    "to": lambda m, w: w.to(torch.float32),
    "float": lambda m, w: w.float(),
    "data": lambda m, w: w.data,
    "detach": lambda m, w: w.detach(),
    "clone": lambda m, w: w.clone(),
    "numpy": lambda m, w: torch.from_numpy(w.float().numpy()),
    "tolist": lambda m, w: torch.tensor(w.tolist()),
    "numbers": lambda m, w: torch.tensor([[float(v) for v in row] for row in w]),
    "nested list": lambda m, w: torch.tensor([[w[i, j] for j in range(6)] for i in range(6)]),
    "as_tensor": lambda m, w: torch.as_tensor(w),
    "mT": lambda m, w: w.mT.mT,
    "T": lambda m, w: w.T.T,
    "H": lambda m, w: w.H.H,
    "index": lambda m, w: w[torch.arange(6)],
    "embedding": lambda m, w: F.embedding(torch.arange(6), w),
    "vector": lambda m, w: nn.utils.parameters_to_vector([w]).view(6, 6),
    "foreach": lambda m, w: torch._foreach_add([w], 0)[0],
    "an op": lambda m, w: torch.ops.aten.add.Tensor(w, 0),
    "dlpack": lambda m, w: torch.from_dlpack(w.detach()),
    "storage": lambda m, w: torch.empty(0, dtype=w.dtype).set_(w.untyped_storage()).view(6, 6),
    "state_dict": lambda m, w: m.state_dict()["weight"],
    "copy of the model": lambda m, w: copy.deepcopy(m).weight.data,
    "functional_call": lambda m, w: (
        torch.func.functional_call(m, dict(m.named_parameters()), torch.eye(6).bfloat16()).T
    ),
}


def test_every_reading_is_perturbed():
    torch.manual_seed(0)
    model = nn.Linear(6, 6, bias=False).bfloat16()
    before = model.weight.detach().float()
    optimizer = ZerothOrder(model, lr=1e-30, eps=EPS, law="sign")
    for name, reading in READINGS.items():
        seen = []
        optimizer.step(lambda: (seen.append(reading(model, model.weight).float()), seen[-1].sum())[1])
        for got in seen:
            torch.testing.assert_close((got - before).abs(), torch.full((6, 6), EPS), rtol=0.02, atol=0, msg=name)


@pytest.mark.parametrize(
    "view",
    [lambda w: w.t(), lambda w: w.data, lambda w: w.detach()[1], lambda w: nn.Parameter(w.data)],
    ids=["t", "data", "a row", "a parameter"],
)
def test_views_from_before_are_refused(view):
    model = nn.Linear(6, 6)
    kept, optimizer = view(model.weight), ZerothOrder(model, lr=0.1)
    with pytest.raises(
        RuntimeError, match="closure must use 'weight' itself, or views of it that it makes, got another"
    ):
        optimizer.step(lambda: model(torch.ones(2, 6)).sum() + (kept * 2).sum())
    kept = kept.clone()  # values of before
    optimizer.step(lambda: model(torch.ones(2, 6)).sum() + (kept * 2).sum())


def test_parameters_as_arguments_of_transforms_are_refused():
    model = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match="closure must use 'weight' itself"):
        ZerothOrder(model, lr=0.1).step(lambda: torch.func.vmap(lambda row: row * 2)(model.weight).sum())


def test_parameters_of_one_memory_are_no_views_of_each_other():
    model = nn.Module()
    flat = torch.randn(4, 6)
    model.top, model.left, model.right = (nn.Parameter(v) for v in (flat[:2], flat[2:, :3], flat[2:, 3:]))
    optimizer = ZerothOrder(model, lr=0.1, include=["left", "top"])
    optimizer.step(
        lambda: (model.top @ torch.ones(6)).sum() + (model.left * model.right).square().sum() + flat.shape[0]
    )
