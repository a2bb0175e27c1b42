"""benchmarks/parts.py: runs that end in their middle, and the table of what each part is worth."""

import signal
import sys

import pytest
from conftest import benchmark

TRAINING = """
import signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--resume" if "--resume" in sys.argv else "--run-dir") + 1])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "words").write_text(" ".join(sys.argv[1:]))
(folder / "checkpoints" / "latest.pt").touch()
signal.signal(signal.SIGINT, lambda *_: ((folder / "saved").touch(), sys.exit(130)))
rows = folder / "eval.csv"
if not rows.exists():
    rows.write_text("step,episode,return\\n")
for step in (40000, 50000):
    with rows.open("a") as file:
        file.write(f"{step},0,{step / 100}\\n")
time.sleep(60)
"""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    module = benchmark("parts")
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    monkeypatch.setattr(module, "PARTS", {"loops": (str(program), "--model.loop.mean-loops 1")})
    return module


def call(monkeypatch, parts, *words):
    monkeypatch.setattr(sys, "argv", ["parts.py", *map(str, words)])
    return parts.main()


def test_a_run_is_saved_and_ended_at_its_middle_and_its_evaluations_are_kept(monkeypatch, parts, tmp_path, capsys):
    words = (tmp_path / "runs", "--csv", tmp_path / "csv", "--tasks", "dmc:walker_walk", "--seeds", 10, 11)
    call(monkeypatch, parts, *words)
    for seed in (10, 11):
        folder = tmp_path / "runs" / f"loops-walker_walk-s{seed}"
        assert (folder / "saved").exists()
        assert f"dmc:walker_walk --seed {seed}" in (folder / "words").read_text()
        assert (folder / "words").read_text().endswith("--model.loop.mean-loops 1")
        assert (tmp_path / "csv" / "loops" / f"walker_walk-s{seed}.csv").read_text().endswith("50000,0,500.0\n")
        (folder / "saved").unlink()
    (tmp_path / "csv" / "loops" / "walker_walk-s11.csv").unlink()
    (folder / "eval.csv").unlink()
    capsys.readouterr()
    call(monkeypatch, parts, *words)  # the first is skipped, the second goes on
    assert f"1 of 2 runs are in {tmp_path / 'csv'}: give another --csv" in capsys.readouterr().out
    assert (folder / "words").read_text() == f"--resume {folder}"
    assert (folder / "saved").exists()
    assert not (tmp_path / "runs" / "loops-walker_walk-s10" / "saved").exists()


def test_a_run_between_two_renames_goes_on_and_what_cannot_is_set_aside(monkeypatch, parts, tmp_path):
    words = (tmp_path / "runs", "--csv", tmp_path / "csv", "--tasks", "dmc:walker_walk", "--seeds", 10, 11)
    first, second = (tmp_path / "runs" / f"loops-walker_walk-s{seed}" for seed in (10, 11))
    (first / "checkpoints").mkdir(parents=True)
    (first / "checkpoints" / "previous.pt").touch()
    second.mkdir()
    (second / "notes.txt").write_text("mine")
    call(monkeypatch, parts, *words)
    assert (first / "words").read_text() == f"--resume {first}"
    assert (second.with_name(second.name + ".unsaved1") / "notes.txt").read_text() == "mine"


def test_a_run_that_ends_before_its_middle_is_named_and_leaves_no_evaluations(monkeypatch, parts, tmp_path, capsys):
    (tmp_path / "training.py").write_text("raise SystemExit('no such task')")
    assert call(monkeypatch, parts, tmp_path / "runs", "--csv", tmp_path / "csv", "--tasks", "dmc:a", "--seeds", 1) == 1
    assert "failed:" in capsys.readouterr().out
    assert not (tmp_path / "csv").exists()


@pytest.fixture
def handlers():
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_at_work_even_if_it_was_ignored(handlers, number, monkeypatch, parts, tmp_path):
    run = parts.Run("loops", "dmc:a", 1, tmp_path / "runs", tmp_path / "csv")
    monkeypatch.setattr(parts, "STEPS", 90_000)
    monkeypatch.setattr(parts.time, "sleep", lambda _: interrupt_when((run.folder / "eval.csv").exists()))

    def interrupt_when(begun):
        if begun:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        parts.train([run], jobs=1)
    assert (run.folder / "saved").exists()
    assert run.process.returncode == 130


def test_the_table_compares_by_the_seeds_that_all_have(parts):
    curve = {30_000: 0.0, 40_000: 4.0, 50_000: 6.0, 60_000: 99.0}

    def level(value):
        return {40_000: value, 50_000: value}

    whole = {"a": {10: curve, 12: level(900.0)}, "b": {10: level(1.0)}}
    loops = {"a": {10: level(2.0)}, "b": {10: level(3.0)}}
    found = {"loops": loops, "core": {"a": {10: level(8.0)}, "b": {10: {30_000: 8.0, 50_000: 8.0}}}}  # one is missing
    assert parts.table(found, whole)[2:] == [
        "| a | 10 | 5 | 2 | 8 |",
        "| b | 10 | 1 | 3 |  |",
        "| mean | | 3 | 2 |  |",
        "| pairs in which the whole agent is better | | | 1 of 2 | 0 of 1 |",
        "| mean lead of the whole agent, 95 % interval | | | 0 +- 32 |  |",  # 3 and -2: 0.5 +- 2.5 * 12.7
        "| the same, over the means of tasks | | | 0 +- 32 |  |",
        "| the same over pairs, at 50,000 steps alone | | | 1 +- 38 | -4 +- 32 |",
        "| the same over pairs, all evaluations to 50,000 | | |  |  |",  # none has all
    ]


def test_a_folder_without_evaluations_is_named_in_place_of_a_table(monkeypatch, parts, tmp_path, capsys):
    assert call(monkeypatch, parts, "--table", tmp_path / "nothing", tmp_path) == 2
    assert "there are no TASK-sSEED.csv" in capsys.readouterr().err
