"""What can go wrong in a run, by the name of who has to do something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What was typed cannot work; the message says what was expected and what to type."""


class NonFiniteError(RuntimeError):
    """A gradient or a loss is not finite; the message names it."""


class EnvironmentFailure(RuntimeError):
    """The environment raised an error; its cause holds it."""


class Interrupted(Exception):
    """An evaluation was given up half-way."""


@contextmanager
def failures() -> Iterator[None]:
    """Inside of this, whatever an environment raises becomes an EnvironmentFailure."""
    try:
        yield
    except Exception as error:
        raise EnvironmentFailure(f"{type(error).__name__}: {error}") from error
