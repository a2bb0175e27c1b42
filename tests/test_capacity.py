"""Memory and disk are looked at before a run takes them."""

import shutil
from dataclasses import replace

import pytest
import torch

from agent.data.checkpoint import read_checkpoint
from agent.errors import UsageError
from agent.runs import capacity
from agent.runs.capacity import check_capacity, out_of_memory, row_bytes, rows_held
from agent.runs.presets import preset
from agent.runs.run import make_agent, make_replay
from agent.runtime import available_memory
from agent.spaces import ActionSpec, Spaces

VECTORS = Spaces.of({"obs": {"a": 20, "b": 3}, "action": {"size": 6, "discrete": False}})
IMAGES = Spaces.of({"obs": {"a": 20, "image": [64, 64, 3]}, "action": {"size": 4, "discrete": True}})


def config(**train):
    small = preset("small")
    return replace(small, train=replace(small.train, **train))


@pytest.fixture
def free(monkeypatch):
    """Sets what is free, in bytes."""

    def provide(memory=1e15, disk=1e15):
        monkeypatch.setattr(capacity, "available_memory", lambda: memory)
        monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, disk))

    return provide


@pytest.mark.parametrize("spaces", [VECTORS, IMAGES])
def test_a_row_is_as_large_as_the_replay_makes_it(spaces):
    settings = config(replay_rows=1000)
    vectors, images = row_bytes(settings, spaces)
    replay = make_replay(settings, 1, spaces, 2)
    assert vectors == sum(value.nbytes for value in replay.rows.values()) / 1000
    replay.open_image_store(None)
    assert images == sum(store.values.nbytes for store in replay.images.values()) / 1000


def test_a_run_of_few_steps_fills_few_rows():
    assert rows_held(config(steps=10_000, replay_rows=500_000), repeat=2) == 5001
    assert rows_held(config(steps=10_000_000, replay_rows=500_000), repeat=2) == 500_000


def test_a_replay_that_does_not_fit_is_told_with_one_that_does(free):
    settings = config(steps=10_000_000)
    free(memory=100e6)
    with pytest.raises(UsageError, match=r"500,000 rows needs .* of memory and 100.0 MB are free: ") as caught:
        check_capacity(settings, VECTORS, 1)
    rows = int(str(caught.value).split("--train.replay-rows ")[1].split()[0])
    assert 50_000 < rows < 500_000
    check_capacity(replace(settings, train=replace(settings.train, replay_rows=rows)), VECTORS, 1)
    check_capacity(config(steps=20_000), VECTORS, 1)
    with pytest.raises(UsageError, match=r"go on with the run on a machine that has more$"):
        check_capacity(settings, VECTORS, 1, {"replay": {}})
    free(memory=1e3)
    with pytest.raises(UsageError, match="too little for any replay"):
        check_capacity(settings, VECTORS, 1)


def test_images_have_to_fit_onto_the_disk(free, tmp_path):
    settings = replace(config(steps=10_000_000), run_dir=str(tmp_path / "not" / "there"))
    free(disk=2e9)
    check_capacity(settings, VECTORS, 1)
    with pytest.raises(UsageError, match=r"of disk and 2.0 GB are free: --train.replay-rows 1\d0000 fits"):
        check_capacity(settings, IMAGES, 1)


def test_what_a_run_occupies_already_is_its_own(free, tmp_path):
    settings = replace(config(steps=10_000_000, replay_rows=1000), run_dir=str(tmp_path))
    free(disk=10e6)
    with pytest.raises(UsageError, match="of disk"):
        check_capacity(settings, IMAGES, 1, {"replay": {}})
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "2-ranks").mkdir()
    (tmp_path / "replay" / "2-ranks" / "image.images").write_bytes(bytes(12_288_000))
    check_capacity(settings, IMAGES, 1, {"replay": {}})


def test_the_replay_of_the_checkpoint_that_was_read_is_not_counted_again(free):
    """It takes the place of that of the run, and its copy that of the checkpoint."""
    settings = config(steps=10_000_000)
    needed = 500_000 * row_bytes(settings, VECTORS)[0]
    rows = {"deter": torch.zeros(needed // 4)[:1].expand(needed // 4)}  # as large as the replay
    free(memory=2.1 * needed)
    check_capacity(settings, VECTORS, 1)
    free(memory=1.1 * needed)
    with pytest.raises(UsageError, match="of memory"):
        check_capacity(settings, VECTORS, 1)
    check_capacity(settings, VECTORS, 1, {"replay": {"rows": rows}})


GROUPS = {
    "two trees": ("4:memory:/job/7\n1:cpu:/\n0::/\n", "memory/job/7", "limit_in_bytes", "usage_in_bytes", "total_"),
    "one tree": ("0::/job/7\n", "job/7", "max", "current", ""),
    "a container": ("0::/elsewhere/on/the/host\n", "", "max", "current", ""),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_limit_of_a_job_or_container_counts(tmp_path, name):
    groups, place, limit, used, prefix = GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(tmp_path) == 8_192_000
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    folder = tmp_path / "sys" / "fs" / "cgroup" / place
    folder.mkdir(parents=True)
    (folder / f"memory.{used}").write_text("900000\n")
    (folder / "memory.stat").write_text(f"cache 1\n{prefix}inactive_file 300000\n{prefix}active_file 1000\n")
    for text, expected in (("1000000\n", 401_000), ("max\n", 8_192_000), (f"{2**63 - 4096}\n", 8_192_000)):
        (folder / f"memory.{limit}").write_text(text)
        assert available_memory(tmp_path) == expected


def test_a_system_that_tells_nothing_refuses_nothing(tmp_path):
    assert available_memory(tmp_path) == float("inf")


def test_networks_that_cannot_be_counted_are_one_line():
    settings = replace(preset("debug"), model=replace(preset("debug").model, classes=10**30))
    with pytest.raises(UsageError, match="cannot be .*: give smaller --model"):
        make_agent(settings, VECTORS, torch.device("cpu"))


def test_full_memory_is_one_line_and_other_errors_are_none():
    refused = "DefaultCPUAllocator: can't allocate memory:\n you tried to allocate 4000 bytes"
    for error in (MemoryError("Unable to allocate 37.3 GiB"), MemoryError(), RuntimeError(refused)):
        line = out_of_memory(error, "lower --train.batch")
        assert line.startswith("memory is full (")
        assert line.endswith(": lower --train.batch")
        assert "\n" not in line
    assert out_of_memory(RuntimeError("shapes do not match"), "") is None


def test_rows_that_a_run_cannot_fill_are_not_reserved():
    short, long = config(steps=5000, replay_rows=500_000), config(steps=10_000_000, replay_rows=500_000)
    wide, few = (Spaces({"state": size}, ActionSpec(2, True)) for size in (20_000, 2))
    assert make_replay(short, 1, wide, repeat=2).length == 2 * (2500 + 17)
    assert make_replay(long, 1, few, repeat=1).length == 500_000
    seen = Spaces({"image": (64, 64, 1)}, ActionSpec(2, True))  # the size of their file never changes
    assert make_replay(short, 1, seen, repeat=2).length == 500_000


@pytest.mark.parametrize("sampling", ["uniform", "recent", "model-error", "value-error"])
def test_a_replay_draws_as_the_settings_say(sampling):
    few = Spaces({"state": 2}, ActionSpec(2, False))
    replay = make_replay(config(steps=5000, sampling=sampling), 1, few, repeat=1)
    assert replay.sampling == sampling
    assert ("priority" in replay.rows) == sampling.endswith("error")


def test_a_run_that_could_never_learn_from_jumps_is_refused():
    few = Spaces({"state": 2}, ActionSpec(2, False))
    jumps = replace(preset("small").model, jump=32)
    for train in ({"replay_rows": 512}, {"steps": 1000}):
        with pytest.raises(UsageError, match="--train.replay-rows 513 and --steps 1026"):
            make_replay(replace(config(**train), model=jumps), 1, few, repeat=2)
    assert make_replay(replace(config(replay_rows=513, steps=1026), model=jumps), 1, few, repeat=2).length == 513
    with pytest.raises(UsageError, match="--steps 4104"):  # which four ranks share
        make_replay(replace(config(replay_rows=513, steps=1026), model=jumps), 1, few, repeat=2, ranks=4)


def test_a_run_with_fewer_rows_reserved_is_extended(script, tmp_path):
    words = ("--preset", "debug", "--no-video", "--train.eval-every", 0)
    done = script("train_agent.py", "toy:cue5", *words, "--steps", 300, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    done = script("train_agent.py", "--resume", "run", "--steps", 600)
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(tmp_path / "run/checkpoints/latest.pt")["replay"]["count"] > 600
