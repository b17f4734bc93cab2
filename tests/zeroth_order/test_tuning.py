"""A pretrained network gains accuracy by forward passes alone, at the memory of inference: what README says of it."""

import pytest

from bench import zeroth_order_tuning


@pytest.fixture(scope="module")
def rows():
    return zeroth_order_tuning.main(["--width", "128", "--steps", "40", "--members", "2", "--lr", "2e-3"])


def test_accuracy_at_the_memory_of_inference(rows):
    (_, before, _, inference), (_, tuned, _, memory), *others = rows.values()
    assert tuned > before + 2
    assert memory <= 1.05 * inference
    for _, reached, _, most in others:
        assert reached > before + 2 and most > 1.5 * inference
