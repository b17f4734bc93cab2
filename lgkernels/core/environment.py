"""What is around the package: Triton, and variables of the environment.

Those are read at each call, without the copies and exceptions of `os.environ`, whose look-up of a variable that is not
set takes as long as a small kernel."""

import functools
import importlib.util
import os

_data = getattr(os.environ, "_data", None)
_encode = getattr(os.environ, "encodekey", None)
_names = ("LGKERNELS_IMPL", "LGKERNELS_CHECK", "LGKERNELS_GRAPHS", "LGKERNELS_TRUST", "TRITON_INTERPRET")
_keys = {name: _encode(name) if _encode else name for name in _names}


def is_set(name: str) -> bool:
    """Whether the variable (one of those above) is set."""
    return _keys[name] in _data if _data is not None else name in os.environ


def value(name: str, default: str) -> str:
    """Its value, or the default."""
    return os.environ[name] if is_set(name) else default


def is_on(name: str) -> bool:
    """Of a switch: 1 is on, 0 is off."""
    if not is_set(name):
        return False
    given = os.environ[name]
    if given not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {given!r}")
    return given == "1"


@functools.lru_cache(maxsize=1)
def triton_fault() -> str | None:
    """Why Triton cannot be used, None if it can; imports it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton  # noqa: F401
    except Exception as error:  # another version of Python or of the C++ library, half an installation
        return (
            f"triton is installed and cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )
    return None
