"""Variables of the environment that are read at each call: without the copies and exceptions of `os.environ`, whose
look-up of a variable that is not set takes as long as a small kernel."""

import os

_data = getattr(os.environ, "_data", None)
_encode = getattr(os.environ, "encodekey", None)
_names = ("LGKERNELS_IMPL", "LGKERNELS_CHECK", "LGKERNELS_TRUST", "TRITON_INTERPRET")
_keys = {name: _encode(name) if _encode else name for name in _names}


def is_set(name: str) -> bool:
    """Whether the variable (one of those above) is set."""
    return _keys[name] in _data if _data is not None else name in os.environ


def value(name: str, default: str) -> str:
    """Its value, or the default."""
    return os.environ[name] if is_set(name) else default
