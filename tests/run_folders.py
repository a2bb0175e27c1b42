"""Folders of runs as files alone, for the tests of comparisons."""

import json
from dataclasses import replace

from agent.runs.cli import save_yaml
from agent.runs.config import Config


def write_run(path, seed=0, horizon=10, task="dmc:cartpole_swingup", returns=(100.0, 300.0), finished=True, first=0):
    """A run with evaluations of two episodes at 1,000 and 2,000 steps, the second episode 10 better."""
    path.mkdir(parents=True)
    config = Config(task=task, seed=seed)
    save_yaml(replace(config, behavior=replace(config.behavior, horizon=horizon)), path / "config.yaml")
    meta = {"task": task, "finished": finished, "commands": [f"python train_agent.py {task}"], "git": {"commit": "abc"},
            "step": 1000 * len(returns)}  # fmt: skip
    (path / "meta.json").write_text(json.dumps(meta))
    lines = ["step,episode,seed,return,length,mean_loops"]
    for i, mean in enumerate(returns):
        lines += [f"{1000 * (i + 1)},{e},{first + e},{mean - 5 + 10 * e},500,1.5" for e in (0, 1)]
    (path / "eval.csv").write_text("\n".join(lines) + "\n")
    (path / "episodes.csv").write_text("step,env,return,length\n500,0,50.0,500\n1500,0,70.0,500\n")
    rows = [{"step": step, "wall": step / 10, "speed/updates": 11.0} for step in (500, 1000, 2000)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
