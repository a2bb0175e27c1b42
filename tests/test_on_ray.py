"""Sweeps on a Ray cluster, where the package is installed: two nodes on this machine, of which one is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT

from agent.errors import UsageError
from agent.runs import on_ray
from agent.runs.node_run import TOKEN, Said
from agent.runs.presets import preset
from agent.runs.sweep import Sweep, place_of
from agent.runs.sweep_grid import SweepRun, parse_sweep
from agent.runs.tune import run_tune

WORDS = ("toy:cue5", "--preset", "debug", "--no-video", "--device", "cpu", "--run-dir", "runs/sweep")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cpus", "2"), "add --on ray"),
        (("--gpus", "1"), "add --on ray"),
        (("--on", "ray", "--cpus", "-1"), "must be 0 or more, got -1 and 0"),
        (("--on", "ray", "--gpus", "nan"), "must be 0 or more"),
    ],
)
def test_what_a_run_takes_is_checked(words, message):
    with pytest.raises(UsageError, match=message):
        parse_sweep([*WORDS, "--sweep", "seed=0,1", *words])


def test_without_the_package_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    grid = parse_sweep([*WORDS, "--sweep", "seed=0,1", "--on", "ray"])
    with pytest.raises(UsageError, match=r"pip install -e '\.\[cluster\]'"), place_of(grid, io.StringIO()):
        pass


# ---------------------------------------------------------------------- a real cluster


@pytest.fixture
def cluster():
    """One node with one CPU; more by add_node."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def wait_for(check, process, seconds=300.0):
    limit = time.monotonic() + seconds
    while not check():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_sweep_outlives_a_node_and_no_run_is_made_twice(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1)
    command = [sys.executable, str(ROOT / "train_agent.py"), *WORDS, "--sweep", "seed=0,1,2,3", "--on", "ray"]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        saved = tmp_path / "runs/sweep"
        wait_for(lambda: len(list(saved.glob("seed=*/checkpoints/latest.pt"))) == 2, sweep)
        cluster.remove_node(second, allow_graceful=False)
        out, err = sweep.communicate(timeout=400)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, out + err
    assert out.count("done ") == 4, out
    for seed in range(4):
        meta = json.loads((saved / f"seed={seed}/meta.json").read_text())
        assert meta["finished"]
        rows = (saved / f"seed={seed}/eval.csv").read_text().splitlines()[1:]
        assert len(rows) == len(set(rows)) == 12
    assert not list(saved.glob("*.unsaved*"))


def test_ctrl_c_saves_the_runs_and_the_same_command_goes_on(cluster, tmp_path):
    command = [sys.executable, str(ROOT / "train_agent.py"), *WORDS, "--sweep", "seed=0,1", "--on", "ray"]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}
    sweep = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "runs/sweep/seed=0/checkpoints/latest.pt"
    wait_for(first.exists, sweep)
    sweep.send_signal(signal.SIGINT)
    out, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 130, out + err
    assert "saved    seed=0" in out, out
    assert not (tmp_path / "runs/sweep/seed=1").exists()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((first.parent.parent / "meta.json").read_text())["commands"]) == 2


def test_a_disk_that_is_full_here_ends_the_run_whose_copy_it_lacks_room_for(tmp_path, monkeypatch):
    """And not the sweep: the other runs go on."""

    class OfRay(Exception):
        pass

    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayActorError=OfRay, RayTaskError=OfRay), get=lambda value: value,
        wait=lambda values, timeout: (values, []), kill=lambda actor: killed.append(actor),
    )  # fmt: skip
    killed = []
    actor = SimpleNamespace(ask=SimpleNamespace(remote=lambda: Said(None, "works", 1.0)))
    run = on_ray.RayRun(ray, SweepRun("seed=0", tmp_path / "seed=0", []), actor, None)
    run.begun, run.answer, run.copy = True, Said(None, "works", 1.0), b"content"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_ray, "unpack", full)
    assert run.poll() == 2
    assert "No space left" in run.said()
    assert killed == [actor]


def test_tuning_without_an_evaluation_on_the_way_is_refused():
    grid = parse_sweep([*WORDS, "--sweep", "seed=0,1", "--on", "ray", "--tune"])
    for every in (0, 600):
        config = replace(preset("debug"), train=replace(preset("debug").train, eval_every=every))
        with pytest.raises(UsageError, match="give --train.eval-every from 1 to 599"):
            run_tune([], grid, config, None)


def test_a_folder_that_nodes_do_not_see_is_copied_back(cluster, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(on_ray, "COPY_SECONDS", 0.0)
    run = SweepRun("seed=0", tmp_path / "seed=0", [*WORDS[:-1], str(tmp_path / "seed=0")])
    with (tmp_path / TOKEN).open("w") as lock, on_ray.on_ray(lock, 1.0, 0.0) as place:
        place.token = "of another machine"
        assert Sweep([run], 1, place, io.StringIO()).run(0.1) == 0
    assert not ray.is_initialized()
    assert (run.state, run.note[:6]) == ("done", "return")
    assert (run.folder / "checkpoints/latest.pt").exists()
    assert "final evaluation" in run.log.read_text()


def test_more_than_a_node_has_is_refused_and_another_version_is_no_lost_node(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    run = SweepRun("seed=0", tmp_path / "seed=0", [*WORDS[:-1], str(tmp_path / "seed=0")])
    with (tmp_path / TOKEN).open("w") as lock:
        with pytest.raises(UsageError, match="no node of the cluster has 2 CPUs and 0 GPUs"), on_ray.on_ray(lock, 2, 0):
            pass
        with on_ray.on_ray(lock, 1.0, 0.0) as place:
            place.source = "another"
            assert Sweep([run], 1, place, io.StringIO()).run(0.1) == 1
    assert "has another version of the project" in run.note


def test_tuning_ends_what_falls_behind_and_does_not_begin_it_again(cluster, tmp_path):
    words = ["gym:CartPole-v1", *WORDS[1:], "--steps", "2000", "--train.ratio", "1", "--train.eval-every", "250"]
    words += ["--sweep", "seed=0,1,2,3,4,5"]
    command = [sys.executable, str(ROOT / "train_agent.py"), *words, "--on", "ray", "--tune"]
    env = {**os.environ, "RAY_ADDRESS": cluster.address}

    def tuned():
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-6:]

    table = tuned()
    states = [line[:11].strip() for line in table]
    assert set(states) == {"done", "ended early"}, table
    assert all("step     2,000" in line for line in table if line.startswith("done")), table
    latest = {path: path.stat().st_mtime for path in tmp_path.glob("runs/sweep/*/checkpoints/latest.pt")}
    assert len(latest) == 6
    assert tuned() == table
    assert latest == {path: path.stat().st_mtime for path in latest}
