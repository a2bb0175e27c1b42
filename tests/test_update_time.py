"""benchmarks/update_time.py: it starts without options, and a row holds the time of every part."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import benchmark


@pytest.fixture
def update_time(monkeypatch):
    module = benchmark("update_time")
    monkeypatch.setattr(module, "FIRST", 1)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_a_row_of_times(update_time, monkeypatch, capsys):
    every = update_time.image_rows
    monkeypatch.setattr(update_time, "image_rows", lambda loop: every(loop)[1:2])
    monkeypatch.setattr(sys, "argv", ["update_time.py", "--images", "dmc", "--preset", "debug", "--updates", "1"])
    update_time.main()
    machine, header, row = capsys.readouterr().out.splitlines()
    assert re.search(r", [12] threads, 1 processes", machine)
    label, numbers = row[:34].strip(), [float(word.replace(",", "")) for word in row[34:].split()]
    assert label == "2 fixed loops"
    assert len(numbers) == len(header[34:].replace("mean loops", "mean_loops").split()) == 8
    parameters, *parts, total, loops = numbers
    assert parameters > 0
    assert loops == 2.0
    assert 0.0 < sum(parts) <= total + 0.5  # each is rounded to a tenth


def test_presets_are_timed_in_turn(update_time, monkeypatch, capsys):
    words = ["--in-turn", "debug", "tiny", "--updates", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["update_time.py", *words])
    update_time.main()
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("none exits")
    assert [row.split()[0] for row in rows] == ["debug", "tiny"]
    assert rows[1].split()[1:3] == ["111,940", "38,657"]
    assert re.findall(r"\(([\d.]+) x\)", rows[0]) == ["1.00", "1.00"]
    assert all(0.0 < float(ratio) < 1.0 for ratio in re.findall(r"\(([\d.]+) x\)", rows[1]))


def test_two_checkouts_are_timed_in_turn(monkeypatch, capsys, tmp_path):
    module = benchmark("interleaved")
    calls = []

    def run(command, cwd, **_):
        calls.append(cwd.name)
        total = 10.0 if cwd.name == "before" else 12.5
        row = f"{'2 fixed loops':34s} {1234:>9,} {total / 2:13.1f} {total:13.1f} {2.0:10.2f}"
        return SimpleNamespace(stdout=f"x86_64, 2 cores\n{'median ms of an update':34s}    params total\n{row}\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["interleaved.py", "before", "after", "--rounds", "2", "--", "--threads", "1"])
    module.main()
    assert calls == ["before", "after", "after", "before"]
    assert capsys.readouterr().out.splitlines()[1].split() == ["2", "fixed", "loops", "10.0", "12.5", *["1.250"] * 3]
