"""Valid calls of the family's public functions."""

import torch

from tests.support.calls import Call
from tests.support.problems import randn

TARGET = torch.tensor([0, 5, 3])

CALLS = {
    "goodness_loss": Call(
        dict(h=randn(3, 2, 4), is_positive=torch.tensor([True, False, True])),
        free={"h": (1, 2)},
        any_sign=("threshold",),
    ),
    "info_nce_loss": Call(
        dict(query=randn(3, 4), keys=randn(5, 4), negatives=torch.tensor([[1, 2], [4, 0], [3, 3]])),
        free={"keys": (0,), "negatives": (1,)},
    ),
    "local_cross_entropy": Call(
        dict(h=randn(3, 4, 2, 5), weight=randn(6, 4), bias=randn(6), target=TARGET), free={"h": (2, 3)}
    ),
    "nt_xent_loss": Call(dict(z=randn(4, 3)), free={"z": (1,)}),
    "overlay_label": Call(
        dict(x=randn(3, 2, 4, 5), label=TARGET, num_classes=6, value=1.0), free={"x": (1, 2, 3)}, any_sign=("value",)
    ),
    "peer_normalization_loss": Call(dict(h_pos=randn(3, 4, 2), running_mean=randn(4, 2)), free={"h_pos": (0,)}),
    "prediction_similarity_loss": Call(
        dict(
            h=randn(3, 4, 5, 7),
            target=TARGET,
            sim_weight=randn(4, 4, 3, 3),
            decoder_weight=randn(6, 16),
            decoder_bias=randn(6),
            num_classes=6,
            pool_kernel=(3, 4),
            pool_padding=(1, 1),
        ),
        free={"h": (2, 3)},  # here the pooled size stays
    ),
    "similarity_matching_loss": Call(
        dict(h=randn(3, 4, 5, 6), target=TARGET, sim_weight=randn(4, 4, 3, 3), num_classes=6), free={"h": (2, 3)}
    ),
    "supcon_loss": Call(
        dict(z=randn(3, 2, 4), target=TARGET, base_temperature=0.1, anchors_without_positives="exclude"),
        free={"z": (1, 2)},
    ),
}

MODULES = {
    "ClassifierBlock": Call(dict(module=torch.nn.Linear(4, 3))),
    "PooledClassifier": Call(dict(block=torch.nn.Linear(4, 6), num_classes=2, pool_size=3)),
    "LocalClassifier": Call(dict(block=torch.nn.Linear(4, 3), channels=3, num_classes=2)),
    "ForwardForwardLayer": Call(dict(layer=torch.nn.Linear(4, 3)), any_sign=("threshold",)),
    "PredSimHead": Call(dict(block=torch.nn.Linear(4, 3), shape=(3,), num_classes=2)),
    "BarlowTwinsHead": Call(dict(block=torch.nn.Linear(4, 3), channels=3)),
    "ReconstructionHead": Call(dict(block=torch.nn.Linear(4, 3), channels=3, in_channels=4)),
    "ContrastiveHead": Call(dict(block=torch.nn.Linear(4, 3), channels=3)),
    "InfoProUnit": Call(
        dict(block=torch.nn.Conv2d(3, 4, 3), channels=4, num_classes=2, image_channels=3), any_sign=("mean", "std")
    ),
    "infopro_weights": Call(dict(units=4, first=(1.0, 0.0), last=(0.0, 1.0))),
}
