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


class BadStep(EnvironmentFailure):
    """The environment returned a reward or an observation that is not finite as float32; the message names both."""


class WorkerFailure(RuntimeError):
    """A process that shares the updates has ended or failed; weights and replay are as before the update."""


class Interrupted(Exception):
    """An evaluation was given up half-way."""


@contextmanager
def failures() -> Iterator[None]:
    """Inside of this, whatever an environment raises becomes an EnvironmentFailure."""
    try:
        yield
    except (EOFError, ConnectionError) as error:  # of the pipe to an environment's process
        raise EnvironmentFailure(
            f"its process has ended (killed, or out of memory): {type(error).__name__} {error}"
        ) from error
    except Exception as error:
        raise EnvironmentFailure(f"{type(error).__name__}: {error}") from error
