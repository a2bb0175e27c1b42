"""Programs of this project started for a test, and what is left of their processes.

Importing PyTorch takes longer than a small run. So this process imports everything once and does nothing with it, and
every run is a fork of it with a session, working directory, arguments and output of its own; `real` ones are new
processes.
"""

import contextlib
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import types
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # a fork must not need threads that only its parent has

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import atexit  # noqa: E402
import threading  # noqa: E402

import matplotlib.pyplot  # noqa: E402, F401 - imported by every run at its end
import torch.utils.tensorboard  # noqa: E402, F401

import evaluate  # noqa: E402
import train_agent  # noqa: E402

PROGRAMS = {"train_agent.py": train_agent, "evaluate.py": evaluate}


class Hung(Exception):
    """A process did not end in its time."""


class Started:
    """A program under way: started in the folder `cwd`, with its output in the files `name`.out and `name`.err."""

    def __init__(self, words, cwd, name, real=False, piped=False, slow_tasks=False, limit=None, memory=None, env=None):
        """words: program and arguments, or one string for the shell, which is always `real`. piped: the output goes
        through another process, `reader`, which can die. slow_tasks: every environment gets a process of its own.
        limit: bytes of the largest file that may be written; memory: bytes of address space.
        """
        self.out, self.err = cwd / f"{name}.out", cwd / f"{name}.err"
        self.began, self.status, self.ended, self.reader = time.monotonic(), None, 0.0, 0
        sys.stdout.flush()
        sys.stderr.flush()
        inlet = None
        if piped:
            outlet, inlet = os.pipe()
            self.reader = os.fork()
            if not self.reader:
                os.close(inlet)
                _copy(outlet, self.out)
            os.close(outlet)
        self.pid = os.fork()
        if self.pid:
            if inlet is not None:
                os.close(inlet)
            return
        try:
            os.setsid()
            os.chdir(cwd)
            os.environ.update(env or {}, PYTHONPATH=str(ROOT))
            for number, path in ((1, self.out), (2, self.err)):
                to_pipe = inlet is not None and number == 1
                file = inlet if to_pipe else os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(file, number)
                os.close(file)
            default_signals()
            for kind, most in ((resource.RLIMIT_FSIZE, limit), (resource.RLIMIT_AS, memory)):
                if most is not None:
                    resource.setrlimit(kind, (most, most))
            if isinstance(words, str):
                os.execv("/bin/sh", ["sh", "-c", f"exec {words}"])
            if real:
                os.execv(sys.executable, [sys.executable, "-u", str(ROOT / words[0]), *words[1:]])
            _live(words, slow_tasks)
        finally:
            os._exit(111)  # nothing above returns

    def poll(self):
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.status

    def wait(self, seconds, kill=True):
        """The exit status. Raises Hung after so many seconds, and ends everything where it may `kill`."""
        limit = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > limit:
                if kill:
                    self.kill_all()
                raise Hung(f"did not end within {seconds:.0f} s")
            time.sleep(0.01)
        return self.status

    def signal(self, number):
        """Send a signal, to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def close_pipe(self):
        """Let whoever reads the output die."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.reader, signal.SIGKILL)
        os.waitpid(self.reader, 0)
        self.reader = 0

    def children(self):
        """The processes that it started with multiprocessing."""
        return [pid for pid in session(self.pid) if pid != self.pid and "spawn_main" in command_of(pid)]

    def seconds_until_alone(self, seconds=30.0):
        """How long after its end the last of its processes ended; infinite where one is left, which is killed."""
        while time.monotonic() < self.ended + seconds:
            if not session(self.pid):
                return time.monotonic() - self.ended
            time.sleep(0.05)
        self.kill_all()
        return float("inf")

    def kill_all(self):
        """End what is left of it."""
        for pid in session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.status is None:
            os.waitpid(self.pid, 0)
            self.status, self.ended = -signal.SIGKILL, time.monotonic()
        if self.reader:
            self.close_pipe()

    def text(self):
        """What it printed: standard output and standard error."""
        return tuple(
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in (self.out, self.err)
        )


def default_signals():
    """As in a process that a shell starts, whatever the tests were started by."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _live(words, slow_tasks):
    """The life of a forked program: what `python train_agent.py ...` does from its first line to its last."""
    main = types.ModuleType("__main__")  # what processes that are spawned from here import anew
    main.__file__, main.__spec__ = str(ROOT / words[0]), None
    sys.modules["__main__"] = main
    sys.argv = [str(ROOT / words[0]), *map(str, words[1:])]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    if slow_tasks:
        from envs import TaskId

        TaskId.is_slow = True
        del main.__file__  # the environment's process does not need PyTorch
    if words[0] == "train_agent.py":  # as it does under `if __name__ == "__main__"`
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    try:
        status = PROGRAMS[words[0]].main(sys.argv[1:])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout.name}\n{type(error).__name__}: {error}", file=sys.stderr)
        status = 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _copy(outlet, path):
    """Copy from a pipe to a file until the pipe ends, as `cat` does."""
    with path.open("wb", buffering=0) as file:
        while data := os.read(outlet, 1 << 16):
            file.write(data)
    os._exit(0)


def forked(function, *args, seconds=120.0):
    """function(*args) in a fork, so that nothing it does stays in this process. Raises RuntimeError where it fails."""
    outlet, inlet = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            os.close(outlet)
            torch.set_num_threads(1)
            try:
                answer = True, function(*args)
            except BaseException:
                answer = False, traceback.format_exc()
            with os.fdopen(inlet, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(inlet)
    data, limit = b"", time.monotonic() + seconds
    while time.monotonic() < limit and select.select([outlet], [], [], limit - time.monotonic())[0]:
        if not (part := os.read(outlet, 1 << 20)):
            break
        data += part
    os.close(outlet)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    fine, answer = pickle.loads(data) if data else (False, "it gave no answer")
    if not fine:
        raise RuntimeError(answer)
    return answer


# ---------------------------------------------------------------------- processes


def session(leader):
    """The processes of a session that are alive."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(own) == leader and state != "Z":
                    found.append(int(folder.name))
    return found


def command_of(pid):
    """The command line of a process; empty where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
