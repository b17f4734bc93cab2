"""Modules of a model picked by name: exact names first, then patterns; a text that picks none is an error."""

import difflib
import fnmatch
import re
from collections.abc import Iterable


def _inside(name: str, names: Iterable[str]) -> set[str]:
    """The module of that name and what is in it."""
    return {n for n in names if n == name or n.startswith(name + ".")}


def by_pattern(text: str, names: Iterable[str]) -> set[str]:
    """An exact name (with what is in it), else a shell pattern, else one whose brackets are part of the names."""
    if text in names:
        return _inside(text, names)
    for pattern in (text, text.replace("[", "[[]")):
        if found := {n for n in names if fnmatch.fnmatchcase(n, pattern)}:
            return found
    return set()


def by_part(text: str, names: Iterable[str]) -> set[str]:
    """As :func:`by_pattern`; else whole parts of a name, "attn.q" of "blocks.0.attn.q"; else a text within a name, in
    which a number is a whole one: "layers.1" is not in "layers.10"."""
    if found := by_pattern(text, names) if text else set():
        return found
    if found := {n for n in names if f".{text}." in f".{n}."}:
        return found
    start, end = (r"(?<!\d)" if text[:1].isdigit() else ""), (r"(?!\d)" if text[-1:].isdigit() else "")
    word = re.compile(start + re.escape(text) + end)
    return {n for n in names if word.search(n)}


def near(text: str, names: Iterable[str]) -> str:
    """Names that `text` may have meant, for a message; empty where none is like it."""
    names = sorted(n for n in names if n)
    found = difflib.get_close_matches(text, names, 4, 0.6)
    parts = difflib.get_close_matches(text.rpartition(".")[2], {part for n in names for part in n.split(".")}, 2, 0.6)
    found += [n for part in parts for n in names if part in n.split(".") and n not in found][:3]
    return f"near it: {', '.join(found)}" if found else ""


def unmatched(argument: str, text: str, names: Iterable[str]) -> ValueError:
    """The error for a text that picks nothing."""
    names = [n for n in names if n]
    known = near(text, names) or f"it has {', '.join(names[:6]) or 'none'}{', ...' if len(names) > 6 else ''}"
    return ValueError(f"{argument} must name modules of the model, got {text!r}, which matches none; {known}")
