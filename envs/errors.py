"""The one error of this package."""


class TaskError(ValueError):
    """A task cannot be found, built or drawn; the message says what to do about it.

    It is a `ValueError`, so a command line can print it without a traceback.
    """
