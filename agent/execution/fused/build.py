"""Compile layers.cpp and distributions.cpp for this processor, once, and load them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("layers.cpp", "distributions.cpp")]
HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
TYPES = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "In": ctypes.c_void_p,
    "Out": ctypes.c_void_p,
    "Index": ctypes.c_void_p,
}


@functools.cache
def load() -> ctypes.PyDLL | None:
    """The kernels, or None, with a warning, where they cannot be compiled. The first call of all may take some seconds.

    PyDLL keeps Python's lock, which a kernel of some microseconds would else wait for.
    """
    try:
        return declare(ctypes.PyDLL(str(compiled())))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a quote of CXX that is not closed
        reason = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
        warnings.warn(f"layers are not fused, and updates take about twice as long: {reason}", stacklevel=2)
        return None


def compiled() -> Path:
    """The compiled file, which stays in the user's cache. Raises OSError, ValueError or SubprocessError."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        raise OSError("there is no C++ compiler (on Debian and Ubuntu: apt install g++)")
    code = b"".join(path.read_bytes() for path in (*SOURCES, HEADER))
    about = hashlib.sha256(code + " ".join((compiler, *FLAGS, processor())).encode()).hexdigest()
    path = cache() / f"kernels-{about[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # two processes may compile at once
            made = Path(folder) / path.name
            command = [*shlex.split(compiler), *FLAGS, *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            made.replace(path)
    return path


def cache() -> Path:
    """The folder of compiled files, made where it is not there: the user's cache, or where nothing can be written there
    one of the user's own among the temporary folders. Raises OSError."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not home.startswith("~"):  # a user without a home
        folder = Path(home) / "looped-dreamer"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"looped-dreamer-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"{folder} can be written by others, and code from there is not run: remove it")
    return folder


def processor() -> str:
    """What tells processors apart that need code of their own: a home folder may be shared by many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")


def declare(library: ctypes.PyDLL) -> ctypes.PyDLL:
    """Tell ctypes the arguments of every function, as the source has them."""
    exported = "".join(path.read_text("utf-8").partition('extern "C"')[2] for path in SOURCES)
    for kind, name, words in re.findall(r"^(void|int64_t) (\w+)\(([^)]*)\)", exported, re.MULTILINE):
        function = getattr(library, name)
        function.argtypes = [TYPES[word.split()[0]] for word in words.split(", ")]
        function.restype = TYPES.get(kind)
    return library
