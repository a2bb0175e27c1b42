"""The errors of this package."""


class TaskError(ValueError):
    """A task cannot be found, built or drawn; the message says what to do about it.

    It is a `ValueError`, so a command line can print it without a traceback.
    """


class BadReturn(TaskError):
    """What an environment returned is not what Gymnasium or its spaces announce; the message says what to change."""
