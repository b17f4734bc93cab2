"""A small CNN and a transformer block learn from forward gradients."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "forward_gradients_of_your_own_network.py"


def test_the_networks_learn():
    accuracies = runpy.run_path(str(EXAMPLE))["main"](steps=100)
    assert accuracies["small CNN"] > 40 and accuracies["transformer block"] > 25
