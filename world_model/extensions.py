"""Cores and exit rules loaded by name, as module:Class: those of a user, of `experiments/`, and the controls."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Raise ValueError with a suggestion unless the name is a known one or module:Class."""
    if name in known or ":" in name:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no {what} {name!r}; {hint}there are {', '.join(known)}, and module:Class of your own")


def build_extension(name: str, base: type[T], **given: Any) -> T:
    """module:Class built with the given arguments, by their order. Raises ValueError where that is not possible."""
    kind = load_class(name, base)
    try:
        return kind(*given.values())
    except Exception as error:  # whatever a person's class does while it is built
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without this one
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        call = f"{kind.__name__}({', '.join(given)})"
        raise ValueError(f"{name} cannot be built as {call}: {type(error).__name__}: {error}{place}") from error


def load_class(name: str, base: type[T]) -> Callable[..., T]:
    """The class that module:Class names. Raises ValueError when it is not there or not a subclass of `base`."""
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a person's module does while it is imported
        hint = "; is its folder on PYTHONPATH?" if isinstance(error, ImportError) else ""
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}{hint}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{name} must be a subclass of world_model.{base.__name__}")
    return kind
