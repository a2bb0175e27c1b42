"""Files that are damaged, of other programs or made to do harm: one line each, and nothing in them is executed."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from test_compare import write_run

import evaluate
from agent.data.checkpoint import read_checkpoint
from agent.errors import UsageError
from agent.interop.load import load_agent
from agent.runs.cli import parse_cli, read_yaml
from agent.runs.compare import Comparison
from agent.runs.comparison_text import format_table
from agent.runs.config import saved_config
from agent.runs.report import write_report
from agent.runs.run_record import find_runs, load_runs
from agent.runs.sweep_grid import parse_sweep

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Ten lines that stand for a billion values."""
ODD = (None, True, -1, 0, 10**30, 2.5, float("nan"), float("inf"), "", "x\ny", "\x1b[31m", "null", "é" * 300,
       [], [1], [[[[1]]]], {}, {"a": 1}, {1: 2})  # fmt: skip
"""Values that nobody expects."""


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def one_line(text):
    """Whether a person can read a message at a glance."""
    return "\n" not in text and "Traceback" not in text and len(text) < 1000


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.mkdir [ran]", "!!python/name:os.system", "seed: !!python/object/apply:os.mkdir [ran]",
    BOMB, BOMB + "seed: *i", BOMB + "task: *i", BOMB + "model: *i", BOMB + "preset: *i", "a: &a [*a]", "&a {seed: *a}",
    "[" * 100_000, "{a: " * 5_000, "seed: 0x" + "f" * 9000, "seed: " + "9" * 5000, "seed: 1e999", "seed: .nan",
    "seed: 2000-99-99", "seed: 2000-01-01", "train: 3", "train: [steps]", "train: {steps: .nan}", "1: 2",
    "train: {ratio: .nan}", "train: {ratio: .inf}", "model: {loop: null}", "eval: ''", "task: [toy:cue]", "task: null",
    "? [a, b]\n: 1", "seed: !!binary aGVsbG8=", "seed: !!set {a, b}", "'two\\nlines': 1", '"two\\nlines": 1', "\0",
    "video: 2", "run: [", "- a", "text", "x" * 300_000, "dataset: \"a\\0b\"", "agent: {a: b}", "device: [1]",
    "model: {core: 'x\\ny'}", "optimizer: {workers: 99999999999999999999}", "%YAML 9.9\n---\n", "\ud83d", "a: *b",
])  # fmt: skip
def test_a_malformed_file_of_settings_is_one_line(tmp_path, text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises((UsageError, SystemExit)) as caught:
        parse_cli(["toy:cue", "--config", "my.yaml", "--preset", "debug"])
    assert caught.type is SystemExit or one_line(str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(UsageError, match="too large for a file of settings"):
        read_yaml("/dev/zero")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_yaml("/")


def test_references_are_read_where_they_stand_for_little(tmp_path):
    (tmp_path / "my.yaml").write_text("units: &u 48\nother: *u\n")
    assert read_yaml(tmp_path / "my.yaml") == {"units": 48, "other": 48}


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished[0] / "checkpoints" / "latest.pt"


def use(path, run):
    """Everything that reads a checkpoint before the first step; whether it could be used."""
    told, status = "", 2
    try:
        saved = read_checkpoint(path)
        saved_config(saved)
        load_agent(saved, "cpu")
        parse_cli(["--resume", str(run), "--steps", "5k"])
        return True
    except UsageError as error:
        told = str(error)
    except SystemExit as stop:
        status = stop.code
    assert one_line(told)
    assert status == 2
    return False


def places(tree, path=()):
    """The paths to all values in nested dictionaries."""
    yield path
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from places(value, (*path, name))


def changed(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: changed(tree[path[0]], path[1:], value)}


def test_values_of_other_types_in_a_checkpoint_are_one_line(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint.parent.parent / "config.yaml", run)
    where, rng = [path for path in places(content) if path and path[0] != "trainer"], np.random.default_rng(0)
    used = 0
    heads = [path for path in where if len(path) <= 2]
    for number in range(120):
        path = heads[number % len(heads)] if number < 80 else where[rng.integers(len(where))]
        odd = ODD[rng.integers(len(ODD))] if rng.random() < 0.8 else torch.zeros(3)
        torch.save(changed(content, path, odd), run / "checkpoints" / "latest.pt")
        used += use(run / "checkpoints" / "latest.pt", run)
    assert used < 60
    capsys.readouterr()


def test_nothing_in_a_checkpoint_is_executed(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    for name in ("config", "step", "agent"):
        torch.save({**content, name: Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
        with pytest.raises(UsageError, match="is damaged or not a checkpoint"):
            read_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- runs


def compare(folder, out=None):
    """Everything that `evaluate.py compare` does; the lines on runs that were left out, or why there is nothing."""
    try:
        runs, left_out = load_runs(find_runs([str(folder)]))
        comparison = Comparison(runs)
        json.dumps(comparison.content())
        format_table(comparison.table())
        if out:
            write_report(comparison, out)
    except UsageError as error:
        left_out = [str(error)]
    assert all(map(one_line, left_out))
    return left_out


def test_damaged_runs_and_models_alone_are_left_out_of_a_comparison(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"run{seed}", seed)
    (tmp_path / "run1" / "eval.csv").write_text("step,episode,seed,return\n1000,0,0,nan\n")
    model = yaml.safe_load((tmp_path / "run2" / "config.yaml").read_text()) | {"model_only": True}
    (tmp_path / "run2" / "config.yaml").write_text(yaml.safe_dump(model))
    first, second = compare(tmp_path)
    assert first == f"left out: {tmp_path}/run1 cannot be read as a run: ValueError: a return is nan"
    assert second.startswith(f"left out: {tmp_path}/run2 trained a world model alone")
    (tmp_path / "run0" / "meta.json").unlink()
    (only,) = compare(tmp_path)
    assert only.endswith("run0 cannot be read as a run: No such file or directory (and 2 more like it)")


@pytest.mark.parametrize(("name", "text"), [
    ("meta.json", "[" * 100_000), ("meta.json", '{"task": 3}'), ("meta.json", '{"task": "dmc:a"}'),
    ("meta.json", '{"task": "dmc:\\ud800\\u0000", "git": 3, "commands": 7, "step": []}'),
    ("meta.json", '{"task": "dmc:a", "git": {"commit": 4}, "commands": [1, null], "finished": "x"}'),
    ("eval.csv", "\0\0\0"), ("eval.csv", "step,seed,return\n1,1\n"), ("eval.csv", 'step,seed,return\n"1,1,1\n'),
    ("eval.csv", "step,seed,return\n" + "9" * 40 + ",1,1\n"), ("eval.csv", "step,seed,return\n-5,1,1\n"),
    ("eval.csv", "step,seed,return\n1,1,1e999\n"), ("eval.csv", "step,seed,return\n1,1," + "1" * 200_000 + "\n"),
    ("episodes.csv", "step,return\n1,nan\n"), ("metrics.jsonl", '{"step": null, "wall": 1}\n'),
    ("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "3\n"), ("metrics.jsonl", '{"step": 1}\n'),
    ("metrics.jsonl", '{"step": 1, "wall": 1' + "0" * 400 + "}\n"),
    ("metrics.jsonl", '{"step": 1, "wall": NaN, "speed/updates": 1' + "0" * 400 + "}\n"),
    ("config.yaml", BOMB + "seed: *i\n"), ("config.yaml", "train: 3\nmodel: []\nseed: [1]\npreset: {a: b}\n"),
    ("config.yaml", 'seed: "a\\nb"\ntask: 5\nbehavior: {horizon: {a: b}}\npreset: nothing\n'),
    ("config.yaml", "- 1\n"), ("config.yaml", "!!python/object/apply:os.mkdir [ran]\n"),
])  # fmt: skip
def test_what_is_wrong_in_the_files_of_a_run_is_one_line(tmp_path, name, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        write_run(tmp_path / "runs" / f"run{seed}", seed)
    (tmp_path / "runs" / "run1" / name).write_text(text, encoding="utf-8")
    compare(tmp_path / "runs", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()  # of what is left
    assert not (tmp_path / "ran").exists()


def test_measurements_of_dreams_that_are_none_are_left_out(tmp_path):
    (write_run(tmp_path / "runs" / "run0") / "model").mkdir()
    for text in ("[" * 100_000, "[]", '{"step": "x"}', '{"step": 2000, "errors": 3}', '{"step": 2000, "errors": [3]}',
                 '{"step": 2000, "errors": [], "values": [{"step": 15, "bias": "x", "error": 1}]}'):  # fmt: skip
        (tmp_path / "runs" / "run0" / "model" / "model.json").write_text(text)
        assert compare(tmp_path / "runs") == []


def test_damaged_bytes_in_the_files_of_a_run_are_one_line(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"run{seed}", seed)
    rng = np.random.default_rng(0)
    names = ("config.yaml", "meta.json", "eval.csv", "episodes.csv", "metrics.jsonl")
    whole = {name: (tmp_path / "run1" / name).read_bytes() for name in names}
    for number in range(100):
        name = names[number % len(names)]
        damaged = bytearray(whole[name])
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] = rng.integers(256)
        (tmp_path / "run1" / name).write_bytes(damaged[: rng.integers(len(damaged))] if number % 3 == 0 else damaged)
        compare(tmp_path)
        (tmp_path / "run1" / name).write_bytes(whole[name])


# ---------------------------------------------------------------------- command lines


@pytest.mark.parametrize("words", [
    ["--sweep"], ["--sweep", "="], ["--sweep", "seed"], ["--sweep", "seed="], ["--sweep", "seed=0,0"],
    ["--sweep", "seed=,1"], ["--sweep", "run_dir=a,b"], ["--sweep", "seeed=0"], ["--sweep", "seed=0", "--jobs", "0"],
    ["--sweep", "seed=0", "--jobs", "2.5"], ["--sweep", "seed=0", "--jobs"], ["--sweep", "units=1,2"],
    ["--sweep", "seed=0", "--sweep", "seed=1"], ["--sweep", "\n=0"],
    ["--sweep", "seed=" + ",".join(map(str, range(200))), "--sweep", "horizon=" + ",".join(map(str, range(1, 200)))],
])  # fmt: skip
def test_a_malformed_sweep_is_one_line(words):
    with pytest.raises(UsageError) as caught:
        parse_sweep(["toy:cue", *words])
    assert one_line(str(caught.value))


@pytest.mark.parametrize("words", [
    ["--resume", "two\nlines"], ["--config", "two\nlines"], ["--run-dir=two\nlines", "--train.slice", "1"],
    ["--model.loop.expand", "inf"], ["--model.loop.expand=nan"], ["--steps", "1e999"], ["--steps", "9" * 5000],
])  # fmt: skip
def test_values_that_cannot_be_end_the_command_with_status_2(words, capsys):
    with pytest.raises((UsageError, SystemExit)) as caught:
        parse_cli(["toy:cue", *words])
    assert one_line(str(caught.value))
    assert caught.type is UsageError or caught.value.code == 2


@pytest.mark.parametrize("count", [float("inf"), float("nan"), "many", [1], {}, None])
def test_an_optimiser_that_has_counted_to_no_number_is_another_version(checkpoint, count):
    saved = read_checkpoint(checkpoint)
    saved["agent"]["optimizers"]["actor"]["updates"] = count
    with pytest.raises(UsageError, match="of another version of the model"):
        load_agent(saved, "cpu")


def test_a_name_that_is_too_long_for_a_file_ends_in_advice(capsys):
    assert evaluate.main(["policy", "a" * 600]) == 2
    assert capsys.readouterr().err.endswith("; look at that place, or give another one\n")
