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
    """Another process of the run has failed, and this one can save what there is."""


class RankLost(WorkerFailure):
    """Another process of the run has ended or cannot be reached: no message follows, and what it had is lost."""


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
    except (Exception, SystemExit) as error:
        raise EnvironmentFailure(in_words(error)) from error


def in_words(error: BaseException) -> str:
    """`Type: message` in one line; of an error of this program the message alone."""
    text = " ".join(str(error).split())
    return text if made_to_be_read(error) else f"{type(error).__name__}: {text}".rstrip(": ")


def made_to_be_read(error: BaseException) -> bool:
    """Whether the error is one of this program, whose message says what is wrong and what to do about it."""
    return type(error).__module__.partition(".")[0] in ("agent", "envs", "world_model")
