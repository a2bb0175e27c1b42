"""A run of a sweep on one node of a cluster: started, asked and ended from elsewhere. Knows nothing of the cluster.

Where the node sees the sweep's folder, the run works in it. Elsewhere it works in a folder of the node, which is copied
back in whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agent.errors import UsageError
from agent.runtime import PROJECT

TOKEN = ".sweep.lock"
"""File of a sweep's folder by which a node sees whether it is the same folder there."""

LARGE, BLOCK = 64 << 20, 1 << 20
"""Bytes from which on a file is copied in blocks, and the bytes of a block."""

DIE_WITH_PARENT = 1
"""Linux: prctl(PR_SET_PDEATHSIG)."""


class Said(NamedTuple):
    """What a run says when it is asked."""

    status: int | None
    """Exit status; None while it works."""
    line: str
    """The last line of its output."""
    saved: float
    """When its last checkpoint was written; 0 before the first one, and where the folder is shared."""


class NodeRun:
    """A process on this node, with the output of the run in a file beside its folder."""

    temporary: str | None = None
    """Folder of this node that holds the run's, where the sweep's folder is not seen."""

    def begin(
        self, folder: str, arguments: Sequence[str], token: str, source: str, content: bytes | None = None
    ) -> None:
        """Start train_agent.py with these arguments.

        folder: of the run, as the sweep knows it; content: its files (`packed`), where a run is to go on; token: what
        the sweep has written into TOKEN; source: see `source_fingerprint`. Raises UsageError where the node's code is
        another.
        """
        if source != source_fingerprint():
            raise UsageError(f"{os.uname().nodename} has another version of the project: bring {PROJECT} up to date")
        self.folder = Path(folder)
        if not self.shared(token):
            self.temporary = tempfile.mkdtemp(prefix="sweep-")
            self.folder = Path(self.temporary) / self.folder.name
            if content is not None:
                unpack(content, self.folder)
        self.log = self.folder.with_name(self.folder.name + ".log")
        words = [str(self.folder) if word == folder else word for word in arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / "train_agent.py"), *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, process_group=0, preexec_fn=prepare_child,
            )  # fmt: skip

    def shared(self, token: str) -> bool:
        try:
            return self.folder.with_name(TOKEN).read_text() == token
        except OSError:
            return False

    def ask(self) -> Said:
        """How it stands. Where it has ended and the folder is shared, nothing of it is left here."""
        status, saved = self.process.poll(), 0.0
        if self.temporary:
            with contextlib.suppress(OSError):  # before the first one, and between two renames
                saved = (self.folder / "checkpoints" / "latest.pt").stat().st_mtime
        return Said(status, last_line(self.log), saved)

    def interrupt(self) -> None:
        """Let it save and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def packed(self) -> bytes | None:
        """All files of the run and its log, where nobody else sees them."""
        if not self.temporary:
            return None
        return pack(self.folder, self.log)

    def forget(self) -> None:
        """Delete what is left on this node, once it was copied."""
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)


def prepare_child() -> None:
    """In the child: it hears SIGINT, which the workers of a cluster block, and gets SIGTERM when the process that
    started it dies, as when its node is taken down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)


def source_fingerprint() -> str:
    """A number that two nodes share if the programs of this project are the same on both."""
    digest = hashlib.sha256()
    rooms = (sorted((PROJECT / room).rglob("*.py")) for room in ("agent", "envs", "world_model"))
    for path in [PROJECT / "train_agent.py", *itertools.chain(*rooms)]:
        digest.update(str(path.relative_to(PROJECT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def reading_order(path: Path) -> tuple[bool, bool, bool, Path]:
    """Key of the order in which the files of a run at work are read: checkpoints, then the images that they count on,
    then their counters. Images that were overwritten in between are then known to be lost. Written in reverse."""
    return path.suffix == ".count", path.suffix == ".images", "checkpoints" not in path.parts, path


def pack(*paths: Path) -> bytes:
    """Files and folders side by side, as a compressed archive. What is deleted meanwhile is left out.

    Large files, the images of a replay, are read in blocks; what of them was not written yet takes no room.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.dereference = True
        for top in paths:
            for path in [top, *sorted(top.rglob("*"), key=reading_order)] if top.is_dir() else [top]:
                name = str(path.relative_to(top.parent))
                if path.is_dir():
                    archive.addfile(archive.gettarinfo(path, name))
                    continue
                try:
                    file = path.open("rb")
                except OSError:
                    continue
                with file:  # the size is that of the open file, which nobody replaces
                    info = archive.gettarinfo(arcname=name, fileobj=file)
                    if info.size > LARGE:
                        archive.addfile(info, file)
                        continue
                    content = file.read()
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Put what `pack` gave beside `folder`, whose files it may hold. Each file is replaced at once, or not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".copied-", dir=folder.parent))
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.isfile() and member.size > LARGE:
                    write_sparse(archive, tarfile.data_filter(member, str(place)), place)
                else:
                    archive.extract(member, place, filter="data")
        for path in sorted(place.rglob("*")):
            if path.is_dir():
                (folder.parent / path.relative_to(place)).mkdir(exist_ok=True)
        for path in sorted(place.rglob("*"), key=reading_order, reverse=True):
            if not path.is_dir():
                os.replace(path, folder.parent / path.relative_to(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_sparse(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
    """Write a file of the archive with holes where it holds zeros: the images that a replay has no rows for yet."""
    content, path = archive.extractfile(member), place / member.name
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while block := content.read(BLOCK):
            if block.count(0) == len(block):
                file.seek(len(block), os.SEEK_CUR)
            else:
                file.write(block)
        file.truncate(member.size)
    if member.mode is not None:
        path.chmod(member.mode)


def last_line(log: Path, tail: int = 4096) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - tail))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip(" │─╰╯")), "")
