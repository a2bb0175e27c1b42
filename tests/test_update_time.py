"""benchmarks/update_time.py: it starts without options, and a row holds the time of every part."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import benchmark

from agent.runs.presets import preset


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
    machine, header, row, floor = capsys.readouterr().out.splitlines()
    assert re.search(r", [12] threads, 1 processes", machine)
    label, numbers = row[:34].strip(), [float(word.replace(",", "")) for word in row[34:].split()]
    assert label == "2 fixed loops"
    assert len(numbers) == len(header[34:].replace("mean loops", "mean_loops").split()) == 8
    parameters, *parts, total, loops = numbers
    assert parameters > 0
    assert loops == 2.0
    assert (count := re.search(r"([\d.]+) GFLOP of products at (\d+) GFLOP/s: floor ([\d.]+) ms, ratio [\d.]+$", floor))
    operations, rate, least = map(float, count.groups())
    assert least == pytest.approx(1e3 * operations / rate, rel=0.1, abs=0.06)
    assert 0.0 < sum(parts) <= total + 0.5  # each is rounded to a tenth


def test_presets_are_timed_in_turn(update_time, monkeypatch, capsys):
    words = ["--in-turn", "debug", "tiny", "debug+gru", "--updates", "2", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["update_time.py", *words])
    update_time.main()
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("none exits")
    assert [row.split()[0] for row in rows] == ["debug", "tiny", "debug+gru"]
    assert rows[1].split()[1:3] == ["111,940", "38,657"]
    assert re.findall(r"\(([\d.]+) x\)", rows[0]) == ["1.00"] * 4  # updates and imagined steps, with and without exits
    shown = (re.findall(r"([\d.]+) \(([\d.]+) x\)", row) for row in rows[:2])
    first, other = ([(float(ms), float(ratio)) for ms, ratio in pairs] for pairs in shown)
    assert len(first) == len(other) == 4
    for (least, _), (took, ratio) in zip(first, other, strict=True):  # which one is faster depends on what else runs
        assert ratio == pytest.approx(least / took, rel=0.03, abs=0.01)
    monkeypatch.setattr(sys, "argv", ["update_time.py", "--in-turn", "small+gruu"])
    with pytest.raises(SystemExit):
        update_time.main()
    assert "gruu" in capsys.readouterr().err


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


def test_plain_layers_are_timed_beside_fused_ones(update_time, monkeypatch, capsys):
    sizes = {"reference": update_time.with_fixed_loops(preset("debug"))}
    monkeypatch.setattr(update_time, "preset", lambda _: preset("debug"))
    monkeypatch.setattr(update_time, "reference_sizes", lambda _: sizes)
    monkeypatch.setattr(sys, "argv", ["update_time.py", "--plain", "--updates", "2", "--threads", "1"])
    update_time.main()
    _, header, plain, fused, *floors, last, its_plain, its_fused, _ = capsys.readouterr().out.splitlines()
    assert header.endswith("over the floor")
    assert last.split() == ["reference", "two", "fixed", "loops", "over", "the", "floor"]
    assert all(re.search(r"layers +[\d.]+ +[\d.]+$", row) for row in (its_plain, its_fused))
    assert [row[:34].strip() for row in (plain, fused)] == ["plain layers", "fused layers"]
    assert all(re.search(r" [\d.]+ +[\d.]+ +[\d.]+, [\d.]+$", row) for row in (plain, fused))
    assert all(re.search(r"GFLOP of products at \d+ GFLOP/s: floor [\d.]+ ms$", line) for line in floors)


def test_the_operations_of_products_are_counted(update_time):
    with update_time.Products() as products:
        torch.randn(3, 4) @ torch.randn(4, 5)
        torch.randn(3, 4) + 1.0
    assert products.operations == 2 * 3 * 4 * 5
