"""What an autograd Function of this form cannot do is refused by name, in eager and compiled code and in exports."""

import pytest
import torch

import lgkernels.functional as LF
import lgkernels.nn as lnn
from tests.support.problems import randn, targets

pytestmark = pytest.mark.unpoisoned

X, W, Y = randn(3, 6), randn(4, 6, seed=1), targets(3, 4)
FUNCTIONS = {
    "feedback_linear": lambda x: LF.feedback_linear(x, W, feedback=W).sum(),
    "sign_symmetric_conv2d": lambda x: LF.sign_symmetric_conv2d(x.view(3, 6, 1, 1), W.view(4, 6, 1, 1)).sum(),
    "lls_loss": lambda x: LF.lls_loss(x, Y, num_classes=4, pool_size=6),
    "local_cross_entropy": lambda x: LF.local_cross_entropy(x, W, None, Y),
    "goodness_loss": lambda x: LF.goodness_loss(x, Y > 0),
    "peer_normalization_loss": lambda x: LF.peer_normalization_loss(x, torch.ones(6))[0],
    "similarity_matching_loss": lambda x: LF.similarity_matching_loss(x, Y, num_classes=4),
    "nt_xent_loss": lambda x: LF.nt_xent_loss(torch.cat([x, x + 1])),
    "supcon_loss": lambda x: LF.supcon_loss(x, Y),
    "info_nce_loss": lambda x: LF.info_nce_loss(x, x + 1, negatives=torch.tensor([[1], [2], [0]])),
    "lora_linear": lambda x: LF.lora_linear(x, W, a=W[:1], b=W[:, :1], scale=0.1).sum(),
    "lokr_linear": lambda x: LF.lokr_linear(x, W, w1=W[:2, :2], w2=W[:2, :3], scale=0.1).sum(),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms(name):
    """Compiled, Dynamo would drop the rule in silence and give exact back-propagation, or 0."""
    gradient = torch.func.grad(FUNCTIONS[name])
    with pytest.raises(NotImplementedError, match=f"{name} does not support torch.func"):
        gradient(X)
    with pytest.raises(NotImplementedError, match=f"{name} does not support torch.func"):
        torch.compile(gradient, backend="aot_eager")(X)
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported)):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(X)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.classifier = lnn.SignSymmetricLinear(6, 5), torch.nn.Linear(5, 4)

    def forward(self, x, target):
        h = self.layer(x)
        return self.classifier(h), LF.local_cross_entropy(h, self.classifier.weight, None, target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_export_runs_and_does_not_learn(training, strict):
    model = Model().train(training)
    exported = torch.export.export(model, (X, Y), strict=strict).module()
    outputs, expected = exported(X, Y), model(X, Y)
    torch.testing.assert_close(outputs, expected)
    for out in outputs if training else outputs[1:]:  # in evaluation the layer is torch's own
        with pytest.raises(NotImplementedError, match="an exported graph has no backward pass of"):
            out.sum().backward(retain_graph=True)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_in_evaluation_needs_no_lgkernels(strict):
    """It is loaded by programs that do not know the rule."""
    model = torch.nn.Sequential(lnn.SignSymmetricConv2d(2, 3, 2), torch.nn.Flatten(), lnn.FeedbackAlignmentLinear(3, 2))
    exported = torch.export.export(model.eval(), (randn(2, 2, 2, 2),), strict=strict)
    assert "lgkernels" not in exported.graph_module.code


def test_an_export_of_frozen_weights_has_no_seal():
    model = Model().requires_grad_(False)
    exported = torch.export.export(model, (X, Y), strict=False)
    assert "without_backward" not in exported.graph_module.code
