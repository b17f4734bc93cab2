"""convert of a trained network, and three epochs of fine-tuning with sign-symmetric feedback."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fine_tune_with_sign_symmetry.py"


def test_accuracy_is_kept():
    before, after = runpy.run_path(str(EXAMPLE))["main"](pretraining=4, samples=1024)
    assert before > 55 and after >= before
