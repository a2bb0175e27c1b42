"""Sweeps: the grid on the command line, the state of its folders, and running it."""

import io
import json
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import UsageError
from agent.runs.cli import parse_cli, save_yaml
from agent.runs.config import Config
from agent.runs.node_run import last_line
from agent.runs.sweep import Local, Sweep, folder_lock
from agent.runs.sweep_grid import SweepRun, make_runs, parse_sweep
from agent.runs.sweep_table import SweepTable
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


def runs_of(*words):
    return make_runs(parse_sweep([*TASK, *map(str, words)]), parse)


def fake(tmp_path, *kinds):
    """A sweep of runs that are played by CHILD: a number of seconds, or fail."""
    runs = [SweepRun(f"run{i}", tmp_path / f"run{i}", [kind, "--run-dir", str(tmp_path / f"run{i}")])
             for i, kind in enumerate(kinds)]  # fmt: skip
    return runs


def test_no_sweep_is_no_grid():
    assert parse_sweep([*TASK, "--seed", "3"]) is None


def test_the_grid_is_every_combination_as_one_plain_command(tmp_path):
    words = ("--sweep", "behavior.horizon=3,5", "--sweep", "seed=0,1", "--run-dir", tmp_path)
    runs = runs_of(*words)
    assert [run.name for run in runs] == [f"horizon={h},seed={s}" for h in (3, 5) for s in (0, 1)]
    first = parse(runs[1].arguments)
    assert (first.behavior.horizon, first.seed, first.run_dir) == (3, 1, str(tmp_path / "horizon=3,seed=1"))
    assert "/train_agent.py toy:cue5 --preset debug --behavior.horizon 3 --seed 1" in runs[1].command


def test_tasks_and_switches_can_be_swept(tmp_path):
    words = ["--sweep", "task=toy:cue5,toy:serial", "--sweep", "video=true,false", "--run-dir", str(tmp_path)]
    runs = make_runs(parse_sweep(words), parse)
    assert [parse(run.arguments).task for run in runs] == ["toy:cue5"] * 2 + ["toy:serial"] * 2
    assert [parse(run.arguments).video for run in runs] == [True, False] * 2
    assert runs[0].name == "task=toy-cue5,video=true"
    assert "--preset small" in runs[0].command  # whatever the machine that runs it would choose
    with pytest.raises(UsageError, match="names the tasks already: leave toy:words out, or add it to them"):
        make_runs(parse_sweep(["toy:words", *words]), parse)


def test_paths_are_absolute_on_a_node_of_a_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = SweepRun("a", Path("runs/a"), ["toy:cue5", "--config", "own.yaml", "--run-dir", "runs/a"])
    assert run.elsewhere(run.arguments) == [
        "toy:cue5", "--config", str(tmp_path / "own.yaml"), "--run-dir", str(tmp_path / "runs/a"),
    ]  # fmt: skip


def test_runs_side_by_side_use_one_thread_each(tmp_path):
    words = ["toy:cue5", "--device", "cpu", "--sweep", "seed=0,1", "--run-dir", str(tmp_path)]
    assert parse(make_runs(parse_sweep([*words, "--jobs", "2"]), parse)[0].arguments).train.threads == 1
    assert parse(make_runs(parse_sweep(words), parse)[0].arguments).train.threads == 0


def test_runs_side_by_side_do_not_share_their_updates_unless_told(tmp_path):
    def shared(*more):
        grid = parse_sweep(["toy:cue5", "--preset", "pixels", "--sweep", "seed=0,1", "--run-dir", str(tmp_path), *more])
        return parse(make_runs(grid, parse)[0].arguments).optimizer.workers

    assert shared() == min(2, cores())
    assert shared("--jobs", "2") == 1
    assert shared("--jobs", "2", "--optimizer.workers", "4") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "behavior.horizn=3"], "did you mean behavior.horizon"),
        (["--sweep", "rate=3"], "there is no setting rate"),
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
        parse_sweep([*TASK, *words, "--run-dir", "x"])


def test_a_sweep_needs_a_folder():
    with pytest.raises(UsageError, match="give --run-dir DIR"):
        runs_of("--sweep", "seed=0,1")


def test_values_that_cannot_be_stop_the_sweep_before_it_starts(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        runs_of("--sweep", "behavior.horizon=5,0", "--run-dir", tmp_path / "x")
    assert stop.value.code == 2
    assert "horizon must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_finished_runs_are_known_by_their_settings(tmp_path):
    words = ("--sweep", "seed=0,1", "--run-dir", tmp_path)
    folder = tmp_path / "seed=0"
    folder.mkdir()
    save_yaml(parse([*TASK, "--seed", "0"]), folder / "config.yaml")
    (folder / "meta.json").write_text(json.dumps({"finished": True, "results": {"final": {"mean": 3, "std": 1}}}))
    first, second = runs_of(*words)
    assert (first.state, first.note, second.state) == ("done", "return 3 +- 1", "waiting")
    with pytest.raises(UsageError, match=r"other settings \(behavior.horizon\)"):
        runs_of(*words, "--behavior.horizon", 4)


def test_an_interrupted_run_is_resumed_and_one_without_checkpoint_put_aside(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        folder.mkdir()
        save_yaml(parse([*TASK, "--seed", str(seed)]), folder / "config.yaml")
    (tmp_path / "seed=0" / "checkpoints").mkdir()
    (tmp_path / "seed=0" / "checkpoints" / "latest.pt").write_bytes(b"")
    runs = runs_of("--sweep", "seed=0,1", "--run-dir", tmp_path)
    assert [run.state for run in runs] == ["stopped", "waiting"]
    said = [sys.executable, "-c", "import sys; print(*sys.argv[1:])"]
    Sweep(runs, 1, Local(said), io.StringIO()).run(0.01)
    assert last_line(runs[0].log) == f"--resume {tmp_path / 'seed=0'}"
    assert last_line(runs[1].log).startswith("toy:cue5 --preset debug --seed 1")
    assert (tmp_path / "seed=1.unsaved1" / "config.yaml").exists()


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    runs, out = fake(tmp_path, "fail", "0.01", "0.01"), io.StringIO()
    status = Sweep(runs, 1, Local((sys.executable, "-c", CHILD)), out).run(0.01)
    assert status == 1
    assert [run.state for run in runs] == ["failed", "done", "done"]
    assert runs[0].note == "status 1: it broke"
    text = out.getvalue()
    assert "return 12.5 +- 1" in text
    assert f"failed: run0, see {runs[0].log}" in text


def test_no_more_runs_at_a_time_than_asked_for(tmp_path):
    runs, most = fake(tmp_path, *["0.3"] * 4), 0
    sweep = Sweep(runs, 2, Local((sys.executable, "-c", CHILD)), io.StringIO())
    worker = threading.Thread(target=_without_signals(sweep))
    worker.start()
    while worker.is_alive():
        most = max(most, sum(run.state == "running" for run in runs))
        time.sleep(0.01)
    assert most == 2
    assert all(run.state == "done" for run in runs)


def _without_signals(sweep):
    """`run` for a thread: only the main thread may set signal handlers."""
    from contextlib import nullcontext

    sweep.signals = nullcontext
    return lambda: sweep.run(0.01)


def test_ctrl_c_lets_the_runs_save_and_begins_no_new_one(tmp_path):
    runs = fake(tmp_path, "60", "60")

    def interrupt():
        while "ready" not in last_line(runs[0].log):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert Sweep(runs, 1, Local((sys.executable, "-c", CHILD)), io.StringIO()).run(0.02) == 130
    assert [run.state for run in runs] == ["saved", "waiting"]
    assert last_line(runs[0].log) == "saved"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_under_nohup_the_loss_of_the_terminal_stops_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        (run,) = fake(tmp_path, "0.5")
        threading.Timer(0.2, signal.raise_signal, [signal.SIGHUP]).start()
        assert Sweep([run], 1, Local((sys.executable, "-c", CHILD)), io.StringIO()).run(0.02) == 0
        assert run.state == "done"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_cannot_go_on_is_not_called_saved(tmp_path):
    (run,) = fake(tmp_path, "60")
    run.can_resume = False

    def interrupt():
        while "ready" not in last_line(run.log):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert Sweep([run], 1, Local((sys.executable, "-c", CHILD)), io.StringIO()).run(0.02) == 130
    assert run.state == "stopped"


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    with folder_lock(tmp_path) as lock:
        lock.write("a token that nodes of a cluster read")
        lock.flush()
        with pytest.raises(UsageError, match="another sweep, or a run"), folder_lock(tmp_path):
            pass
        assert (tmp_path / ".sweep.lock").read_text().startswith("a token")
    with folder_lock(tmp_path):
        pass


def test_a_run_that_outlives_its_sweep_keeps_the_folder(tmp_path):
    (run,) = fake(tmp_path, "60")
    with folder_lock(tmp_path) as lock:
        Sweep([run], 1, Local((sys.executable, "-c", CHILD), lock), io.StringIO()).start(run)
    with pytest.raises(UsageError, match="left behind"), folder_lock(tmp_path):
        pass
    run.process.kill()
    run.process.wait()
    with folder_lock(tmp_path):
        pass


def test_a_slice_that_is_over_is_no_failure(tmp_path):
    (run,) = fake(tmp_path, "0")
    program = "import pathlib, sys\nmark = pathlib.Path(sys.argv[-1] + '.once')\n"
    program += "if not mark.exists():\n    mark.touch()\n    sys.exit(75)\n" + CHILD.replace(
        'sys.argv[sys.argv.index("--run-dir") + 1]), sys.argv[1]', 'sys.argv[-1]), "0"'
    )
    assert Sweep([run], 1, Local((sys.executable, "-c", program)), io.StringIO()).run(0.02) == 0
    assert run.state == "done"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_in_a_terminal_is_drawn_over_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    assert Sweep(fake(tmp_path, "0.01"), 1, Local((sys.executable, "-c", CHILD)), out).run(0.05) == 0
    text = out.getvalue()
    assert "\x1b[1A\x1b[2K" in text  # up one line, and clear it
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", text)
    assert re.search(r"running +run0 ", plain)
    assert re.search(r"done +run0 +return 12.5 \+- 1", plain)
    assert "1 of 1 runs done" in plain


def test_a_low_terminal_shows_the_running_and_failed_runs_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "5")
    runs = [replace(run, state=state) for run, state in
            zip(fake(tmp_path, *"0" * 5), ("done", "waiting", "running", "failed", "done"), strict=True)]  # fmt: skip
    table = SweepTable(runs, Terminal()).table()
    assert [cell.plain for cell in table.columns[1].cells] == ["run1", "run2", "run3"]


def test_names_with_brackets_are_no_markup(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with SweepTable([SweepRun("run[bold]", tmp_path / "x", [], note="[/]")], out) as table:
        table.update()
    assert "run[bold]" in out.getvalue()


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
    assert listed[1].endswith(f"--seed 1 --run-dir {Path.cwd()}/grid/seed=1")
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
