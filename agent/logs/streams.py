"""Standard output and error that cannot end a program: neither by a reader that is gone nor by a letter.

A run goes on when `head` has read enough, when the terminal is closed and when the disk of its log file is full: what
is printed from then on goes nowhere. Letters that the encoding lacks are printed as \\u20ac.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

GONE = {errno.EPIPE, errno.EIO, errno.ECONNRESET}
"""A reader that has ended or a terminal that is closed: nobody is there to be told."""
WRAPPED = ("stdout", "stderr")


class _LastingFile(io.FileIO):
    """A file descriptor whose writes never fail: after the first failure it leads to os.devnull."""

    def __init__(self, number: int):
        super().__init__(number, "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # the reader has asked for writes that do not wait
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self.failure = error
            _lead_nowhere(self.fileno())  # the descriptor itself, so that libraries are silent too
            if error.errno not in GONE and self.fileno() != 2:
                print(f"note: {error.strerror}: nothing more is printed", file=sys.stderr)
        return size


def _lead_nowhere(number: int) -> None:
    """Let a file descriptor lead to os.devnull."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number, inheritable=True)
        os.close(nowhere)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside of this, printing never raises. Streams of a notebook or a test stay as they are."""
    for number in range(3):  # of a program that was started with >&-: the next file would get its number
        try:
            os.fstat(number)
        except OSError:
            _lead_nowhere(number)
    before = {name: getattr(sys, name) for name in WRAPPED}
    lasting = {name: _lasting(stream) for name, stream in before.items()}
    for name, stream in lasting.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in before.items():
            if lasting[name] is not stream:
                lasting[name].flush()
            if stream is None:
                lasting[name].close()
            setattr(sys, name, stream)


def _lasting(stream: TextIO | None) -> TextIO:
    """The same stream over a `_LastingFile`; where there is none, one that leads nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper:
        return stream
    try:
        number = stream.fileno()
        stream.flush()
    except ValueError:  # in memory, or closed
        return stream
    except OSError:  # broken already
        _lead_nowhere(number)
    buffer = io.BufferedWriter(_LastingFile(number))
    return io.TextIOWrapper(
        buffer, stream.encoding, "backslashreplace", "\n", stream.line_buffering, stream.write_through
    )


def failure_of(stream: TextIO) -> OSError | None:
    """Why what was written to the stream did not arrive, though somebody would read it; None where it did."""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    failure = cast("OSError | None", getattr(raw, "failure", None))
    return failure if failure is not None and failure.errno not in GONE else None
