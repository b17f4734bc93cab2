"""Arguments that the family's op accepts: see integration/test_door.py (lists of tensors: tests/offset)."""

DOORS = {"offset_sgd_": ([], [], [], [], 0.1, 0.9, 0.0, 1.0, 1.0, 1.0)}
