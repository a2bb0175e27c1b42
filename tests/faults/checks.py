"""Whether what a run left in its folder belongs together: the checkpoint, its replay, the logs, meta.json.

E: environments, n: rows of each in the replay.
"""

import csv
import json
from pathlib import Path

import numpy as np
import yaml

from agent.data.checkpoint import find_checkpoint, read_checkpoint, replay_of
from agent.logs.logger import EPISODE_COLUMNS, EVAL_COLUMNS
from envs import TaskId

CHANGES = ("resume", "run_dir")
"""Settings of config.yaml that a resumed run may have otherwise."""


def seen_step(run):
    """The last step that the logs of a run tell of, whole lines alone; 0 where there are none."""
    steps = [0]
    for name in ("episodes.csv", "eval.csv", "metrics.jsonl"):
        lines = whole_lines(run / name)
        if lines and name.endswith(".csv") and lines[-1][0].isdigit():
            steps.append(int(lines[-1].split(",")[0]))
        elif lines and name.endswith(".jsonl"):
            steps.append(json.loads(lines[-1])["step"])
    return max(steps)


def whole_lines(path):
    """The lines of a file that have a line end."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []


def saved_step(run):
    """(step, finished, seconds since 1970) of the checkpoint that a resume would use; None where there is none."""
    if not any((run / "checkpoints" / name).exists() for name in ("latest.pt", "previous.pt")):
        return None
    path = find_checkpoint(run)
    saved = read_checkpoint(path)
    return saved["step"], saved["trainer"]["finished"], path.stat().st_mtime


def problems(run, legs, ended, reference=None):
    """What is wrong with the folder of a run that has had so many parts, as sentences; [] where nothing is.

    ended: it came to its end; otherwise a resume would begin where its checkpoint is, and the logs may know more.
    reference: its first config.yaml.
    """
    run = Path(run)
    path = find_checkpoint(run)
    saved = read_checkpoint(path)
    found = replay_problems(saved, replay_of(saved, path), run, legs)
    step = saved["step"]
    logged = {name: read_log(run / name, ended, found) for name in ("episodes.csv", "eval.csv", "metrics.jsonl")}
    if ended:
        found += [f"{name} knows step {rows[-1][0]}, beyond {step}" for name, rows in logged.items()
                  if rows and rows[-1][0] > step]  # fmt: skip
        found += evaluation_problems(logged["eval.csv"], saved)
        found += meta_problems(run, step)
        found += [f"left over: {left.relative_to(run)}" for left in run.rglob("*")
                  if ".tmp" in left.name or left.name.endswith(".damaged")]  # fmt: skip
    if reference is not None and settings(run) != reference:
        found.append("config.yaml has other settings than at first")
    return found


def settings(run):
    """What config.yaml says, without what a resume may change; None where there is no whole file."""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return isinstance(values, dict) and {name: value for name, value in values.items() if name not in CHANGES}


# ---------------------------------------------------------------------- logs


def read_log(path, ended, found):
    """(step, wall or columns) of the lines of a log; what is wrong with them is added to `found`."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")
    if ended and lines[-1]:
        found.append(f"{path.name} ends within a line")
    lines = lines[:-1]
    if path.suffix == ".csv":
        columns = EPISODE_COLUMNS if path.name == "episodes.csv" else EVAL_COLUMNS
        if lines and lines[0] != ",".join(columns):
            found.append(f"{path.name} begins with {lines[0]!r}")
        rows = list(csv.reader(lines[1:]))
        found += [f"{path.name}: the line {row} is torn" for row in rows if len(row) != len(columns)]
        rows = [tuple(map(float, row)) for row in rows if len(row) == len(columns)]
        keys = [row[:2] for row in rows]  # (step, environment), (step, episode)
    else:
        rows = []
        for line in lines:
            try:
                values = json.loads(line)
                rows.append((values["step"], values["wall"]))
            except (ValueError, KeyError, TypeError):
                found.append(f"{path.name}: the line {line[:60]!r} is torn")
        keys = lines
        if any(late < early for (_, early), (_, late) in zip(rows, rows[1:], strict=False)):
            found.append(f"{path.name}: the time runs backwards")
    if len(set(keys)) != len(keys):
        found.append(f"{path.name} has {len(keys) - len(set(keys))} doubled lines")
    if any(after[0] < before[0] for before, after in zip(rows, rows[1:], strict=False)):
        found.append(f"{path.name}: the steps run backwards")
    return rows


def evaluation_problems(rows, saved):
    """Whether every evaluation that was due is there once, with all its episodes."""
    train, cfg = saved["config"]["train"], saved["config"]["eval"]
    due = (train["steps"] - 1) // train["eval_every"] + 1 if train["eval_every"] else 1
    counts = {}
    for step, *_ in rows:
        counts[step] = counts.get(step, 0) + 1
    found = []
    if len(counts) != due:
        found.append(f"eval.csv has {len(counts)} evaluations of {due}: at {sorted(map(int, counts))}")
    *between, final = counts.values() or [0]
    if final != (cfg["episodes"] or 10) or any(count != cfg["interim_episodes"] for count in between):
        found.append(f"eval.csv has evaluations of {[*between, final]} episodes")
    return found


def meta_problems(run, step):
    """Whether meta.json agrees."""
    try:
        meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"meta.json: {error}"]
    found = [f"a failure: {failure}" for failure in meta.get("failures", [])
             if not (failure["what"].startswith("drawing") and "No space left" in failure["error"])]  # fmt: skip
    if (meta.get("step"), meta.get("finished")) != (step, True):
        found.append(f"meta.json has step {meta.get('step')}, finished {meta.get('finished')}; the checkpoint {step}")
    return found


# ---------------------------------------------------------------------- replay


def replay_problems(saved, replay, run, legs):
    """Whether the replay of a checkpoint has the steps, the episodes and the images that it should have."""
    repeat = TaskId.parse(saved["task"]).action_repeat
    row = {name: value.numpy() for name, value in saved["trainer"]["row"].items()}
    columns = {}
    for name in ("is_first", "is_last", "reward"):
        columns[name] = np.asarray(replay["rows"][name])
        rows = columns[name].shape[1]
        if rows != replay["count"]:
            capacity = saved["config"]["train"]["replay_rows"] // len(columns[name])
            if rows == capacity < replay["count"]:
                return []  # its first rows are overwritten
            return [f"the replay counts {replay['count']} rows and holds {rows}"]
        if row:  # what was seen last and is not in the replay yet
            columns[name] = np.concatenate([columns[name], row[name][:, None]], 1)
    found, first = [], columns["is_first"]
    if (steps := int((~first).sum()) * repeat) != saved["step"]:
        found.append(f"the replay holds {steps} steps, and the run has made {saved['step']}")
    logged = [tuple(map(float, line.split(","))) for line in whole_lines(run / "episodes.csv")[1:]]
    for env in range(len(first)):
        known = [(ret, length) for step, number, ret, length in logged if number == env and step <= saved["step"]]
        found += episode_problems(env, known, episodes(columns, env, repeat), legs)
    for values in replay["rows"].values():
        if values.ndim == 5 and "Told" in saved["task"]:
            found += image_problems(np.asarray(values), np.asarray(replay["rows"]["reward"]), replay)
    return found


def episodes(columns, env, repeat):
    """(return, length) of the episodes of one environment that the replay holds to their end."""
    starts = np.flatnonzero(columns["is_first"][env])
    found = []
    for start, stop in zip(starts, [*starts, len(columns["reward"][env])][1:], strict=True):
        if columns["is_last"][env, stop - 1]:
            found.append((float(columns["reward"][env, start:stop].sum()), repeat * (stop - start - 1)))
    return found


def episode_problems(env, logged, held, legs):
    """Whether episodes.csv and the replay know the same episodes. Those cut by the end of a part are not logged."""
    rest = iter(held)
    missing = 0
    for ret, length in logged:
        for other, steps in rest:
            if steps == length and np.isclose(ret, other, rtol=1e-4, atol=1e-4):
                break
        else:
            missing += 1
    unlogged = len(held) - (len(logged) - missing)
    found = [f"environment {env}: {missing} episodes of episodes.csv are not in the replay"] if missing else []
    if not missing and unlogged > legs:
        found.append(f"environment {env}: {unlogged} episodes of the replay are not in episodes.csv, in {legs} parts")
    return found


def image_problems(images, reward, replay):
    """Whether the pictures of Told are one grey each, and that of their reward."""
    grey = images[..., 0, 0, 0].astype(np.float32)
    rows = np.arange(replay["count"]) >= replay["first_intact"]
    wrong = (grey != reward) & ~np.asarray(replay["rows"]["is_first"]) & rows
    torn = (images.min((2, 3, 4)) != images.max((2, 3, 4))) & rows
    found = [f"{int(wrong.sum())} pictures do not belong to their reward"] if wrong.any() else []
    return [*found, *([f"{int(torn.sum())} pictures are torn"] if torn.any() else [])]
