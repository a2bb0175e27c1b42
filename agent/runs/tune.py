"""Tuning by Ray Tune: runs of a sweep that fall behind end early (ASHA, Li et al. 2020, arXiv 1810.05934).

    python train_agent.py TASK --sweep optimizer.lr=3e-4,1e-3,3e-3 --sweep seed=0,1 --on ray --tune --run-dir DIR

Milestones are the evaluations during training. At the first one, and at three times as many steps each time, the better
third of the runs goes on. What has ended early stays as it is, and can be resumed by hand.
"""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.data.checkpoint import has_saved
from agent.errors import UsageError
from agent.numbers import number
from agent.runs.config import Config
from agent.runs.folder import in_use, read_meta
from agent.runs.node_run import NodeRun
from agent.runs.sweep_grid import MOST_LOSSES, SweepGrid, SweepRun
from agent.training.schedule import UNFINISHED

FURTHER = 3
"""Of so many runs one goes on at a milestone, to so many times the steps."""

PATIENCE = 120.0
"""Seconds that a run has to save when it ends early."""


def evaluations(folder: Path, episodes: int) -> list[tuple[int, float]]:
    """(step, mean return) of the evaluations in a run's folder that have so many episodes, in order."""
    returns: dict[int, list[float]] = defaultdict(list)
    try:
        with (folder / "eval.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                returns[int(row["step"])].append(float(row["return"]))
    except (OSError, ValueError, TypeError, KeyError):  # not there yet, or a line is being written
        pass
    return [(step, sum(values) / len(values)) for step, values in returns.items() if len(values) >= episodes]


class Trial:
    """One run of so many steps as Tune sees it: a report for every evaluation, of so many episodes at least.

    The process starts when the reports of an earlier part of the run are used up, so that a run which had fallen behind
    is not begun again. token, source: see `NodeRun`.
    """

    def __init__(
        self, folder: str, arguments: Sequence[str], token: str, source: str, steps: int, episodes: int
    ):  # fmt: skip
        self.folder, self.arguments, self.token, self.source = Path(folder), list(arguments), token, source
        self.steps, self.episodes, self.reported = steps, episodes, 0
        self.run: NodeRun | None = None

    def report(self, pause: float = 1.0) -> dict[str, Any]:
        """Wait for the next evaluation: {"step", "return", "done"}. Raises RuntimeError where the run failed."""
        while True:
            finished = bool(read_meta(self.folder).get("finished"))
            rows = evaluations(self.folder, self.episodes)
            if not finished and rows and rows[-1][0] >= self.steps:
                rows.pop()  # to be reported when all is saved: the run is ended after its last report
            if self.reported < len(rows):
                step, value = rows[self.reported]
                self.reported += 1
                return {"step": step, "return": value, "done": finished and self.reported == len(rows)}
            if finished:
                return {"done": True}
            self.go_on()
            time.sleep(pause)

    def go_on(self) -> None:
        """See to it that the run is at work. Raises RuntimeError where it has failed."""
        if self.run is None and self.folder.exists() and in_use(self.folder):
            return  # by the same run on a node that was lost: it is saving
        if self.run is None:
            begun = has_saved(self.folder)
            self.run = NodeRun()
            arguments = ["--resume", str(self.folder)] if begun else self.arguments
            self.run.begin(str(self.folder), arguments, self.token, self.source)
            if self.run.temporary:
                self.end()
                raise UsageError("--tune needs a --run-dir that all nodes see under the same path")
            return
        said = self.run.ask()
        if said.status == UNFINISHED:  # --train.slice: the next part begins
            self.run.forget()
            self.run = None
        elif said.status is not None and not read_meta(self.folder).get("finished"):
            raise RuntimeError(f"status {said.status}: {said.line}")

    def end(self) -> None:
        """Let the run save and end, if it works."""
        if self.run is None:
            return
        self.run.interrupt()
        limit = time.monotonic() + PATIENCE
        while self.run.ask().status is None and time.monotonic() < limit:
            time.sleep(0.1)
        self.run.forget()


# ---------------------------------------------------------------------- the cluster


def run_tune(runs: list[SweepRun], grid: SweepGrid, config: Config, place: Any) -> int:
    """Tune over the runs on the cluster `place`, and print a table. Returns the exit status; raises UsageError.

    config: of one of the runs.
    """
    train, episodes = config.train, config.eval.interim_episodes
    if not 0 < train.eval_every < train.steps:
        last = train.steps - 1
        raise UsageError(f"--tune compares runs at evaluations on the way: give --train.eval-every from 1 to {last}")
    try:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler
    except ImportError:
        raise UsageError("--tune needs the package ray with its extra tune: pip install -e '.[cluster]'") from None

    class Trainable(tune.Trainable):  # type: ignore[misc]
        """A `Trial`, in the names that Tune asks for."""

        def setup(self, config: Mapping[str, Any]) -> None:
            self.trial = Trial(**config["trial"])

        def step(self) -> dict[str, Any]:
            return self.trial.report()

        def save_checkpoint(self, _: str) -> dict[str, Any]:
            return {}  # the run saves itself

        def load_checkpoint(self, _: Any) -> None:
            pass

        def cleanup(self) -> None:
            self.trial.end()

    class Lines(tune.Callback):  # type: ignore[misc]
        """A line for every evaluation."""

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:
            if "return" in result:
                name = Path(trial.config["trial"]["folder"]).name
                print(f"{name:{width}s}  step {result['step']:>9,}  return {number(result['return'])}", flush=True)

    width = max(len(run.name) for run in runs)
    trials = [
        {"folder": str(run.folder.absolute()), "arguments": run.elsewhere(run.arguments), "token": place.token,
         "source": place.source, "steps": train.steps, "episodes": episodes}
        for run in runs
    ]  # fmt: skip
    scheduler = ASHAScheduler(
        time_attr="step", metric="return", mode="max", max_t=train.steps, grace_period=train.eval_every,
        reduction_factor=FURTHER,
    )  # fmt: skip
    folder = runs[0].folder.parent.absolute()
    most = grid.jobs if grid.jobs < len(runs) else None
    with tempfile.TemporaryDirectory(prefix="tune-") as records:
        results = tune.Tuner(
            tune.with_resources(Trainable, {"cpu": grid.cpus, "gpu": grid.gpus}),
            param_space={"trial": tune.grid_search(trials)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=most),
            run_config=tune.RunConfig(
                name=folder.name, storage_path=records, verbose=0, callbacks=[Lines()],
                failure_config=tune.FailureConfig(max_failures=MOST_LOSSES),
            ),
        ).fit()  # fmt: skip
    failed = {Path(result.config["trial"]["folder"]).name for result in results if result.error and result.config}
    return print_table(runs, episodes, failed)


def print_table(runs: Sequence[SweepRun], episodes: int, given_up: Collection[str] = ()) -> int:
    """Print how far each run came, the best first. Returns 1 where a run failed: one that was given up, or that has no
    evaluation."""
    came = {run.name: (evaluations(run.folder, episodes) or [(0, -math.inf)])[-1] for run in runs}
    width, failed = max(map(len, came)), 0
    for name, (step, value) in sorted(came.items(), key=lambda item: (-item[1][0], -item[1][1])):
        done = read_meta(runs[0].folder.parent / name).get("finished")
        state = "done" if done else "failed" if step == 0 or name in given_up else "ended early"
        failed += state == "failed"
        print(f"{state:11s} {name:{width}s}  step {step:>9,}" + (f"  return {number(value)}" if step else ""))
    return 1 if failed else 0
