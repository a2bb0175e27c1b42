"""Malformed inputs: command lines, settings, checkpoints, logs, data sets and environments.

    python -m tests.faults.fuzz --count 1000 --jobs 2 --out fuzz.csv

What must hold: no traceback of this program, exit status 2 (1 for an environment that fails, 0 where the input was
fine), one line that says what to type or change, no byte of an existing run changed by what was refused, and nothing
in a file executed. Cases that are in the file already are not repeated. Exit status 1 where something was wrong.
"""

import hashlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.ends import mine, options, share_out
from tests.faults.inputs import Inputs
from tests.faults.table import Table

KINDS = {"command line": 26, "evaluate": 12, "settings": 14, "checkpoint bytes": 14, "checkpoint content": 14,
         "logs": 10, "data set": 8, "environment": 22}  # fmt: skip
SECONDS = 20.0
"""Seconds after which a command that has begun to work is ended by SIGTERM."""
MEMORY = 12 << 30
"""Bytes of address space of a command: what asks for more is refused by the system."""
COLUMNS = ("number", "kind", "outcome", "status", "seconds", "what", "command", "message", "wrong", "folder")
REMEDY = re.compile(
    r"--\w|evaluate\.py|train_agent\.py|\b(give|choose|use|expected?|must|leave|write|install|supported|there (are|is)|"
    r"mean|need(s|ed)?|required|run|keep|make|set|wait|check|look|rename|remove|at (least|most)|below|between|"
    r"cannot change|cannot be read|invalid|suites are|start|only|should|too few|more|other|another|return)\b"
)

OF_THE_WORLD = re.compile(r"OddWorld|its (observation )?space says|is not a finite|(Memory|Recursion)Error|SystemExit")
"""What somebody else's environment has raised or returned: its author is to look there."""

# ---------------------------------------------------------------------- judgement


def fingerprint(folder):
    """{path: hash} of the files of a folder, without the lock, which has no content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }  # fmt: skip


def message_of(err):
    """The error that a command ended with: its last line, where there is one that begins so, or tyro's box."""
    if "╭" in err:
        return " ".join(re.sub(r"[╭╮╰╯─│]", " ", err[err.index("╭") :]).split())
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith(" ")]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def judge(kind, what, words, status, err, ended, changed, mark):
    """What is wrong with the end of a command, as sentences."""
    wrong, message = [], message_of(err)
    traces = err.count("Traceback (most recent call last)")
    own = kind == "environment" and status in (1, 2) and 'oddities.py", line' in err and message.startswith("error: ")
    if traces and not own:
        wrong.append("a traceback")
    if ended:
        wrong += [f"status {status} after SIGTERM"] if status not in (143, -signal.SIGTERM) else []
    elif status == 130 and '"interrupts"' in what:
        pass  # as Ctrl-C
    elif status == 75 and "--train.slice" in words:
        pass  # a slice that was over at once
    elif status == 1 and kind in ("settings", "command line") and "is not finite at step" in message:
        pass  # a learning rate beyond all bounds is a setting; what comes of it is said
    elif status not in (0, 1, 2) or (status == 1 and kind not in ("environment", "checkpoint content")):
        wrong.append(f"status {status}")
    elif status:
        if not (message.startswith("error: ") or "╭" in err):
            wrong.append("no line that begins with error:")
        elif not REMEDY.search(message) and not (kind == "environment" and OF_THE_WORLD.search(message)):
            wrong.append("the message names nothing to do")
        if len(message) > 3000:
            wrong.append(f"a message of {len(message)} characters")
        if changed:
            wrong.append(f"changed though refused: {', '.join(changed)}")
    return [*wrong, *(["a file was executed"] if mark.exists() else [])]


def play(number, seed, work, inputs, kind):
    """One case, of this kind if one is given; its row."""
    rng, start = random.Random(f"{seed} fuzz {number}"), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz{number:04}-", dir=work))
    here = folder / "a" / "b"  # so that ../.. is still inside
    here.mkdir(parents=True)
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    words, what, guarded, env = getattr(inputs, kind.replace(" ", "_"))(rng, folder)
    before = [fingerprint(each) for each in guarded]
    process = inputs.runs.Started(words, here, "out", memory=MEMORY, env={"HOME": str(here), **env})
    ended = False
    try:
        status = process.wait(SECONDS, kill=False)
    except inputs.runs.Hung:
        process.signal(signal.SIGTERM)
        ended, status = True, process.wait(30.0)
    after = [fingerprint(each) for each in guarded]
    pairs = [(old, new, name) for old, new in zip(before, after, strict=True) for name in sorted({*old, *new})]
    changed = [name for old, new, name in pairs if old.get(name) != new.get(name)]
    err = process.text()[1]
    wrong = judge(kind, what, words, status, err, ended, changed, folder / "mark")
    if (here / "mark").exists():
        wrong.append("a file was executed")
    process.kill_all()
    line = f"ODD='{env['ODD']}' " if env else ""
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "number": number, "kind": kind, "status": status, "what": what, "command": line + " ".join(map(repr, words)),
        "outcome": "wrong" if wrong else "ran" if status == 0 or ended else "refused", "message": message_of(err)[:600],
        "seconds": round(time.monotonic() - start, 1), "wrong": "; ".join(wrong), "folder": folder if wrong else "",
    }  # fmt: skip


def main():
    args = options(1000, "fuzz.csv", kind="")
    table = Table(args.out, COLUMNS)
    inputs = Inputs(Path(args.work) / f"fuzz-bench-{args.seed}")
    if args.jobs > 1:
        share_out(args, "tests.faults.fuzz")
    else:
        for number in mine(args, table):
            row = play(number, args.seed, args.work, inputs, args.kind)
            row = {name: str(value).encode("utf-8", "replace").decode() for name, value in row.items()}
            table.add(row)
            if row["wrong"]:
                print(f"{number:4} {row['kind']:18} {row['what'][:100]}  {row['wrong']}\n     {row['message'][:300]}")
    if args.part == "0/1":
        print(table.summary("kind", ("seconds",)))
        return int(any(row["outcome"] == "wrong" for row in table.rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
