"""Sweeps: the grid on the command line, the state of its folders, and running it."""

import io
import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from agent.errors import UsageError
from agent.runs.cli import parse_cli, save_yaml
from agent.runs.config import Config
from agent.runs.grid import Cell, make_cells, take_grid
from agent.runs.sweep import Sweep, last_line, only_one
from agent.runtime import cores

TASK = ("toy:cue5", "--preset", "debug")

CHILD = """
import json, pathlib, signal, sys, time
folder, kind = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]), sys.argv[1]
folder.mkdir(parents=True, exist_ok=True)
print("one line", flush=True)
def save(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
if kind == "fail":
    sys.exit("it broke")
time.sleep(float(kind))
facts = {"finished": True, "results": {"final": {"mean": 12.5, "std": 1.0}}}
(folder / "meta.json").write_text(json.dumps(facts))
"""


def parse(words):
    return parse_cli(words)[0]


def cells_of(*words):
    return make_cells(take_grid([*TASK, *map(str, words)]), parse)


def fake(tmp_path, *kinds):
    """A sweep of runs that are played by CHILD: a number of seconds, or fail."""
    cells = [Cell(f"run{i}", tmp_path / f"run{i}", [kind, "--run-dir", str(tmp_path / f"run{i}")])
             for i, kind in enumerate(kinds)]  # fmt: skip
    return cells


def test_no_sweep_is_no_grid():
    assert take_grid([*TASK, "--seed", "3"]) is None


def test_the_grid_is_every_combination_as_one_plain_command(tmp_path):
    words = ("--sweep", "behavior.horizon=3,5", "--sweep", "seed=0,1", "--run-dir", tmp_path)
    cells = cells_of(*words)
    assert [cell.name for cell in cells] == [f"horizon={h},seed={s}" for h in (3, 5) for s in (0, 1)]
    first = parse(cells[1].words)
    assert (first.behavior.horizon, first.seed, first.run_dir) == (3, 1, str(tmp_path / "horizon=3,seed=1"))
    assert cells[1].command.startswith("python train_agent.py toy:cue5 --preset debug --behavior.horizon 3 --seed 1")


def test_tasks_and_switches_can_be_swept(tmp_path):
    grid = take_grid(["--sweep", "task=toy:cue5,toy:serial", "--sweep", "video=true,false", "--run-dir", str(tmp_path)])
    cells = make_cells(grid, parse)
    assert [parse(cell.words).task for cell in cells] == ["toy:cue5"] * 2 + ["toy:serial"] * 2
    assert [parse(cell.words).video for cell in cells] == [True, False] * 2
    assert cells[0].name == "task=toy-cue5,video=true"


def test_runs_side_by_side_use_one_thread_each(tmp_path):
    words = ["toy:cue5", "--device", "cpu", "--sweep", "seed=0,1", "--run-dir", str(tmp_path)]
    assert parse(make_cells(take_grid([*words, "--jobs", "2"]), parse)[0].words).train.threads == 1
    assert parse(make_cells(take_grid(words), parse)[0].words).train.threads == 0


def test_runs_side_by_side_do_not_share_their_updates_unless_told(tmp_path):
    def shared(*more):
        grid = take_grid(["toy:cue5", "--preset", "pixels", "--sweep", "seed=0,1", "--run-dir", str(tmp_path), *more])
        return parse(make_cells(grid, parse)[0].words).optimizer.workers

    assert shared() == min(2, cores())
    assert shared("--jobs", "2") == 1
    assert shared("--jobs", "2", "--optimizer.workers", "4") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "behavior.horizn=3"], "did you mean behavior.horizon"),
        (["--sweep", "lr=3"], "there is no setting lr"),
        (["--sweep", "units=3"], "there is no one setting units; did you mean .*behavior.units"),
        (["--sweep", "seed"], "write --sweep FIELD=V1,V2"),
        (["--sweep", "seed=0,,1"], "gives no values"),
        (["--sweep", "seed=1,1"], "holds a value twice"),
        (["--sweep", "seed=1", "--sweep", "seed=2"], "twice seed"),
        (["--sweep", "run-dir=a,b"], "every run has its own run_dir"),
        (["--sweep", "seed=1", "--jobs", "0"], "--jobs must be at least 1"),
        (["--sweep", "seed=1", "--jobs", "many"], "invalid int value"),
        (["--sweep"], "expected one argument"),
    ],
)
def test_bad_grids_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        take_grid([*TASK, *words, "--run-dir", "x"])


def test_a_sweep_needs_a_folder():
    with pytest.raises(UsageError, match="give --run-dir DIR"):
        cells_of("--sweep", "seed=0,1")


def test_values_that_cannot_be_stop_the_sweep_before_it_starts(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cells_of("--sweep", "behavior.horizon=5,0", "--run-dir", tmp_path / "x")
    assert stop.value.code == 2
    assert "horizon must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_finished_runs_are_known_by_their_settings(tmp_path):
    words = ("--sweep", "seed=0,1", "--run-dir", tmp_path)
    folder = tmp_path / "seed=0"
    folder.mkdir()
    save_yaml(parse([*TASK, "--seed", "0"]), folder / "config.yaml")
    (folder / "meta.json").write_text(json.dumps({"finished": True, "results": {"final": {"mean": 3, "std": 1}}}))
    first, second = cells_of(*words)
    assert (first.state, first.note, second.state) == ("done", "return 3 +- 1", "waiting")
    with pytest.raises(UsageError, match=r"other settings \(behavior.horizon\)"):
        cells_of(*words, "--behavior.horizon", 4)


def test_an_interrupted_run_is_resumed_and_one_without_checkpoint_put_aside(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        folder.mkdir()
        save_yaml(parse([*TASK, "--seed", str(seed)]), folder / "config.yaml")
    (tmp_path / "seed=0" / "checkpoints").mkdir()
    (tmp_path / "seed=0" / "checkpoints" / "latest.pt").write_bytes(b"")
    cells = cells_of("--sweep", "seed=0,1", "--run-dir", tmp_path)
    assert [cell.state for cell in cells] == ["stopped", "waiting"]
    said = [sys.executable, "-c", "import sys; print(*sys.argv[1:])"]
    Sweep(cells, 1, said, io.StringIO()).run(0.01)
    assert last_line(cells[0].log) == f"--resume {tmp_path / 'seed=0'}"
    assert last_line(cells[1].log).startswith("toy:cue5 --preset debug --seed 1")
    assert (tmp_path / "seed=1.unsaved1" / "config.yaml").exists()


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    cells, out = fake(tmp_path, "fail", "0.01", "0.01"), io.StringIO()
    status = Sweep(cells, 1, (sys.executable, "-c", CHILD), out).run(0.01)
    assert status == 1
    assert [cell.state for cell in cells] == ["failed", "done", "done"]
    assert cells[0].note == "status 1: it broke"
    text = out.getvalue()
    assert "return 12.5 +- 1" in text
    assert f"failed: run0, see {cells[0].log}" in text


def test_no_more_runs_at_a_time_than_asked_for(tmp_path):
    cells, most = fake(tmp_path, *["0.3"] * 4), 0
    sweep = Sweep(cells, 2, (sys.executable, "-c", CHILD), io.StringIO())
    worker = threading.Thread(target=_without_signals(sweep))
    worker.start()
    while worker.is_alive():
        most = max(most, sum(cell.state == "running" for cell in cells))
        time.sleep(0.01)
    assert most == 2
    assert all(cell.state == "done" for cell in cells)


def _without_signals(sweep):
    """`run` for a thread: only the main thread may set signal handlers."""
    from contextlib import nullcontext

    sweep.signals = nullcontext
    return lambda: sweep.run(0.01)


def test_ctrl_c_lets_the_runs_save_and_begins_no_new_one(tmp_path):
    cells = fake(tmp_path, "60", "60")

    def interrupt():
        while "ready" not in last_line(cells[0].log):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert Sweep(cells, 1, (sys.executable, "-c", CHILD), io.StringIO()).run(0.02) == 130
    assert [cell.state for cell in cells] == ["saved", "waiting"]
    assert last_line(cells[0].log) == "saved"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(UsageError, match="another sweep, or a run"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_a_run_that_outlives_its_sweep_keeps_the_folder(tmp_path):
    (cell,) = fake(tmp_path, "60")
    with only_one(tmp_path) as lock:
        Sweep([cell], 1, (sys.executable, "-c", CHILD), io.StringIO(), lock).start(cell)
    with pytest.raises(UsageError, match="left behind"), only_one(tmp_path):
        pass
    cell.process.kill()
    cell.process.wait()
    with only_one(tmp_path):
        pass


def test_a_slice_that_is_over_is_no_failure(tmp_path):
    (cell,) = fake(tmp_path, "0")
    program = "import pathlib, sys\nmark = pathlib.Path(sys.argv[-1] + '.once')\n"
    program += "if not mark.exists():\n    mark.touch()\n    sys.exit(75)\n" + CHILD.replace(
        'sys.argv[sys.argv.index("--run-dir") + 1]), sys.argv[1]', 'sys.argv[-1]), "0"'
    )
    assert Sweep([cell], 1, (sys.executable, "-c", program), io.StringIO()).run(0.02) == 0
    assert cell.state == "done"


def test_the_table_in_a_terminal_is_drawn_over_itself(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    assert Sweep(fake(tmp_path, "0.01"), 1, (sys.executable, "-c", CHILD), out).run(0.05) == 0
    text = out.getvalue()
    assert "\x1b[2F" in text
    assert "done     run0  return 12.5 +- 1" in text
    assert "1 of 1 runs done" in text


def test_a_sweep_of_real_runs(script):
    words = ("toy:cue5", "--preset", "debug", "--no-video", "--steps", 300, "--train.eval-every", 0,
             "--eval.episodes", 1, "--sweep", "seed=0,1", "--jobs", 2, "--run-dir", "grid")  # fmt: skip
    done = script("train_agent.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done ") == 2
    again = script("train_agent.py", *words)
    assert again.returncode == 0
    assert "running" not in again.stdout
    listed = script("train_agent.py", *words, "--commands").stdout.splitlines()
    assert listed[1].endswith("--seed 1 --run-dir grid/seed=1")
    assert len(listed) == 2
    refused = script("train_agent.py", "toy:nowhere", *words[1:])
    assert refused.returncode == 2
    assert "there is no toy world" in refused.stderr
    short = script("train_agent.py", *words, "--sweep", "train.prefill=100,300", "--run-dir", "short")
    assert short.returncode == 2
    assert "nothing would be learned" in short.stderr
    assert not Path("short").exists()


def test_every_setting_has_one_dotted_name():
    from agent.settings import known_name, names, value_of
    from agent.settings import to_dict as as_dict

    every = list(names(Config))
    assert len(set(every)) == len(every)
    assert {"seed", "behavior.horizon", "model.loop.mean_loops"} <= set(every)
    assert known_name(Config, "--behavior.horizon") == "behavior.horizon" == known_name(Config, "horizon")
    assert known_name(Config, "mean-loops") == "model.loop.mean_loops"
    assert value_of(as_dict(Config()), "behavior.horizon") == Config().behavior.horizon
