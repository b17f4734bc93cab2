"""A tiny language model of `transformers` learns a text by forward passes alone."""

import runpy
from pathlib import Path

from tests.support.tiny_models import transformers

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "zeroth_order_language_model.py"


def test_the_model_learns():
    transformers()
    before, after = runpy.run_path(str(EXAMPLE))["main"](["--steps", "50", "--pretrain", "60"])
    assert after < before - 0.05
