"""Options as fields of dataclasses: what the command offers, what a run keeps, and how a wrong value is refused."""

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Options = TypeVar("Options")


class UsageError(ValueError):
    """One line for the user of the command, whose exit code is then 2."""


def flag(name: str) -> str:
    """A field's name as the command writes it."""
    return "--" + name.replace("_", "-")


def python_name(name: str) -> str:
    """A name of the command as Python writes it."""
    return name.replace("-", "_")


def option(default: Any, text: str | Callable[[], str], **parser: Any) -> Any:
    """A field of a dataclass that is an option of the command.

    Args:
        default: of the field. text: the help, or a function that returns it when it is asked for.
        parser: more of argparse's `add_argument`. The type is the annotation's.
    """
    metadata = {"help": text, "parser": parser}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def own_fields(kind: type) -> list[dataclasses.Field]:
    """The options that the dataclass `kind` defines itself."""
    own = inspect.get_annotations(kind)
    return [f for f in dataclasses.fields(kind) if f.name in own and "help" in f.metadata]


def add_options(parser: argparse._ActionsContainer, kind: type) -> None:
    """Offer the options that `kind` defines itself; what is not given stays out of the parser's result."""
    hints = typing.get_type_hints(kind)
    for field in own_fields(kind):
        text, more = field.metadata["help"], dict(field.metadata["parser"])
        text = text if isinstance(text, str) else text()
        if field.default not in (None, dataclasses.MISSING):
            text += f" (default: {field.default})"
        value = _without_none(hints[field.name])
        if typing.get_origin(value) is list:
            more.update(nargs="*")
        elif value is bool:
            more.update(action=argparse.BooleanOptionalAction)
        elif value is not str:
            more.update(type=value)
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **more)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (value for value in typing.get_args(hint) if value is not type(None))
    return hint


def make(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """`kind` from those of `values` that are its fields. What it refuses is a UsageError."""
    assert dataclasses.is_dataclass(kind)
    try:
        return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})
    except ValueError as error:
        raise UsageError(str(error)) from None


def known(name: str, value: Any, expected: Iterable[Any]) -> None:
    """Refuse a name that is not among `expected`."""
    expected = list(expected)
    if value not in expected:
        raise UsageError(f"unknown {name} {value!r}; expected one of: {', '.join(expected)}")


def choice(options: Any, name: str, expected: Iterable[Any]) -> None:
    """Refuse a value of the field `name` that is not among `expected`."""
    value, expected = getattr(options, name), list(expected)
    if value not in expected:
        raise UsageError(f"{flag(name)} must be one of: {', '.join(filter(None, expected))}, got {value!r}")


def positive(options: Any, *names: str) -> None:
    """Refuse values of the fields `names` that are not above 0; None is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"{flag(name)} must be positive, got {value}")


def not_negative(options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 0:
            raise UsageError(f"{flag(name)} must be at least 0, got {getattr(options, name)}")
