"""Settings as plain values: nested dictionaries, dotted names, and numbers as people write them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import types
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from agent.errors import UsageError

MOST_DIGITS = 300
"""Of a number that is written with an exponent."""


def parse_count(text: str) -> int:
    """Read a whole number as people write it: 100000, 100_000, 1e5, 100k, 0.5M. Raises ValueError."""
    body = text.strip().lower()
    factor = {"k": 1_000, "m": 1_000_000}.get(body[-1:], 1)
    try:
        return int(body)  # however large
    except ValueError:
        pass
    try:
        value = Decimal(body[:-1] if factor > 1 else body) * factor  # exact: as floats 16.1 * 1e3 is no whole number
    except ArithmeticError:
        value = Decimal("nan")
    if not (value.is_finite() and value.adjusted() < MOST_DIGITS and value == value.to_integral_value()):
        raise ValueError(f"{shown(text)} is not a whole number; write 100000, 100_000, 1e5 or 100k")
    return int(value)


def text_of(value: Any) -> str:
    """A value of somebody else as a word of a table: `shown` where it holds line breaks or the like."""
    text = str(value)
    return text if text.isprintable() else shown(text)


def shown(value: Any) -> str:
    """A value of somebody else in a message: on one line, and not longer than a person reads."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return "a number of thousands of digits"


def home_expanded(name: str, path: str) -> str:
    """The path with ~ replaced by the home folder: shells leave it in --run-dir=~/x. name: of the setting.

    Raises ValueError for a path that no message can show: with line breaks, or bytes that are no letters.
    """
    if bad := [letter for letter in path if ord(letter) < 32 or "\ud800" <= letter <= "\udfff"]:
        raise ValueError(f"{option(name)} {shown(path)} holds {bad[0]!r}: give a name of letters")
    return os.path.expanduser(path)


def expand_home(settings: Any, *names: str) -> None:
    """`home_expanded` for these fields of a frozen dataclass, paths or tuples of them."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, tuple):
            object.__setattr__(settings, name, tuple(home_expanded(name, path) for path in value))
        elif value is not None:
            object.__setattr__(settings, name, home_expanded(name, value))


def names(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings below a dataclass: seed, behavior.horizon, model.loop.tokens, .."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from names(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name


def known_name(kind: type[Any], name: str) -> str:
    """The dotted name that a person means: dashes are underscores, and the last part is enough if it is the only one.

    Raises UsageError with a suggestion where there is no such setting, or several.
    """
    every, wanted = list(names(kind)), name.strip().lstrip("-").replace("-", "_")
    if wanted in every:
        return wanted
    ends = [known for known in every if known.endswith(f".{wanted}")]
    if len(ends) == 1:
        return ends[0]
    near = ends or difflib.get_close_matches(wanted, every, n=1) or _near_ends(wanted, every)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"there is {'no one' if ends else 'no'} setting {text_of(name)}{hint}")


def _near_ends(wanted: str, every: list[str]) -> list[str]:
    ends = {known.rpartition(".")[2]: known for known in every}
    return [ends[end] for end in difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=1)]


def option(name: str) -> str:
    """How a setting is spelt on the command line."""
    return "--" + name.replace("_", "-")


def value_of(settings: Mapping[str, Any], name: str) -> Any:
    """What `name` is in nested dictionaries; KeyError where it is not there."""
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ, of those that both nested dictionaries have."""
    changed = []
    for name, value in one.items():
        if name not in other:
            continue
        if isinstance(value, Mapping) and isinstance(other[name], Mapping):
            changed += differences(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            changed.append(prefix + name)
    return changed


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries: `base` with the values of `changes`, level by level."""
    result = dict(base)
    for name, value in changes.items():
        below = base.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        result[name] = value
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Any], values: Any, prefix: str = "") -> Any:
    """The inverse of `to_dict`; missing settings keep their defaults.

    Values are converted to the annotated type, because YAML reads 3e-4 as text.
    Raises UsageError that names the setting when it is unknown or its value cannot be.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{prefix.rstrip('.') or 'the file'} must hold names with values, got {shown(values)}")
    hints, values = get_type_hints(kind), renewed(values, prefix)
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            word = name if isinstance(name, str) and name.isprintable() and len(name) < 80 else shown(name)
            near = difflib.get_close_matches(word, names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise UsageError(f"there is no setting {prefix}{word}{hint}")
    try:
        return kind(**{name: _convert(hints[name], value, prefix + name) for name, value in values.items()})
    except ValueError as error:
        raise UsageError(str(error)) from error


FORMER: dict[str, Any] = {
    "model.dyn_scale": 1.0,
    "model.image.objective": "decode",
    "model.image.scale": 1.0,
    "behavior.replay_value_scale": 0.3,
}
"""Settings that went, and the value that all runs have now. Files that hold another value are of an earlier version."""


def renewed(values: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The settings of a file as they are written today, so that runs of earlier versions can still be read."""
    kept = {name: v for name, v in values.items() if f"{prefix}{name}" not in FORMER or v != FORMER[f"{prefix}{name}"]}
    if prefix == "behavior." and "plan" in kept:  # the candidates; 0 was what the actor decides
        candidates = kept.pop("plan")
        kept.setdefault("decisions", "both" if candidates else "actor")
        if candidates:
            kept["plan_candidates"] = candidates
        else:
            kept.pop("plan_horizon", None)
    return kept


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, f"{name}.")  # type: ignore[arg-type]
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        return _convert_tuple(kind, value, name)
    if get_origin(kind) is Literal:
        good = value in get_args(kind)
    elif kind is bool:
        good = isinstance(value, bool)
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        good = False
    else:
        try:
            return parse_count(str(value)) if kind is int else kind(value)
        except (ValueError, OverflowError):
            good = False
    if not good:
        choices = " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        raise UsageError(f"{name} cannot be {shown(value)}; expected {choices or getattr(kind, '__name__', kind)}")
    return value


def _convert_tuple(kind: Any, value: Any, name: str) -> tuple[Any, ...]:
    """A YAML list as tuple[X, ...] or tuple[X, Y], each element converted."""
    kinds = get_args(kind)
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} cannot be {shown(value)}; expected a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise UsageError(f"{name} cannot be {shown(value)}; expected a list of {len(kinds)} values")
    return tuple(_convert(part, item, f"{name}[{i}]") for i, (part, item) in enumerate(zip(kinds, value, strict=True)))
