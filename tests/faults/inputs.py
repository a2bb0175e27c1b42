"""Inputs of every kind, fine ones and malformed ones, drawn at random."""

import json
import shutil
from pathlib import Path

from tests.faults import damage

SMALL = ("--preset", "debug", "--device", "cpu", "--no-video", "--steps", "60", "--train.prefill", "30",
         "--train.minutes", "0.1", "--train.eval-every", "0", "--eval.episodes", "1", "--train.threads",
         "1")  # fmt: skip
MORE = ("--steps", "340", "--train.eval-every", "0", "--eval.episodes", "1", "--no-video")
"""What a finished run is resumed with."""
YAML = ("!!python/object/apply:os.system ['touch mark']", "a: &a [*a]", "- 1\n- 2", "task: [", "7", "seed: 1\nseed: 2",
        "train: {steps: 1e3}", "\t", "model: 3", "task: {a: b}", "? [a, b]\n: 1", "seed: 2026-01-01",
        "1: 2")  # fmt: skip


class Inputs:
    """What the cases are made from: a finished run and a data set, in the folder `folder`."""

    def __init__(self, folder):
        from tests.faults import runs

        self.runs, self.run, self.data = runs, folder / "good", folder / "data"
        if (folder / "ready").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        words = ["toy:cue5", *SMALL, "--steps", "300", "--train.eval-every", "100", "--run-dir", str(self.run)]
        for line in (["train_agent.py", *words], ["evaluate.py", "dataset", str(self.run), str(self.data)]):
            started = runs.Started(line, folder, "bench")
            assert started.wait(200) == 0, started.text()
        (folder / "ready").touch()

    # ------------------------------------------------------------------ kinds of cases
    # Each returns: program and arguments, what was done, folders that a refusal leaves alone, environment variables.

    def command_line(self, rng, folder):
        from agent.runs.config import Config
        from agent.settings import names

        options = ["--" + name.replace("_", "-") for name in names(Config)]
        options += ["--resume", "--config", "--sweep", "--jobs", "--commands", "--help", "--steps"]
        words = [rng.choice(("toy:cue5", "gym:CartPole-v1", "toy:cue5", rng.choice(damage.WORDS))), *SMALL]
        words += ["--run-dir", "new"] if rng.random() < 0.8 else []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.random()
            option = rng.choice(options)
            if change < 0.6:
                words += [option, rng.choice(damage.WORDS)]
            elif change < 0.7:
                at = rng.randrange(len(words))
                words[at] = rng.choice(damage.WORDS)
            elif change < 0.8:
                del words[rng.randrange(len(words))]
            elif change < 0.9:  # a slip of the finger
                at = rng.randrange(2, len(option))
                words += [option[:at] + rng.choice("abc-._=") + option[at + 1 :], rng.choice(("1", "", "cpu"))]
            else:
                words += [option + "=" + rng.choice(damage.WORDS)]
        return ["train_agent.py", *words], "words", [], {}

    def evaluate(self, rng, folder):
        run = str(self.copy(folder, self.run))
        commands = {
            "policy": [run, "--episodes", "1"], "model": [run, "--episodes", "1", "--horizon", "3", "--windows", "4"],
            "compare": [run, "--out", "compared"], "dataset": [run, "data"], "export": [run, "policy.pt2"],
            "collect": ["toy:cue5", "collected", "--episodes", "10"],
        }  # fmt: skip
        more = ("--episodes", "--seed", "--max-loops", "--exit", "--exit-threshold", "--exit-histogram", "--checkpoint",
                "--device", "--json", "--horizon", "--windows", "--out", "--by", "--nov", "--run", "--sb3")  # fmt: skip
        name = rng.choice(list(commands))
        words = commands[name]
        change = rng.random()
        if change < 0.6:
            words += [rng.choice(more), rng.choice(damage.WORDS)]
        elif change < 0.8:
            words[rng.randrange(len(words))] = rng.choice(damage.WORDS)
        else:
            del words[rng.randrange(len(words))]
        words.insert(0, name if rng.random() < 0.95 else rng.choice(damage.WORDS))
        return ["evaluate.py", *words], "words", [Path(run)], {}

    def settings(self, rng, folder):
        import yaml

        path = folder / "settings.yaml"
        if rng.random() < 0.25:
            shutil.copy(self.run / "config.yaml", path)
            what = damage.damage_bytes(rng, path)
        elif rng.random() < 0.15:
            text = rng.choice(YAML)
            path.write_text(text)
            what = repr(text)
        else:
            content = yaml.safe_load((self.run / "config.yaml").read_text())
            what = ", ".join(damage.change_tree(rng, content) for _ in range(rng.choice((1, 1, 2))))
            path.write_text(yaml.safe_dump(content, allow_unicode=True))
        return ["train_agent.py", "--config", str(path), *SMALL[2:], "--run-dir", "new"], what, [], {}

    def checkpoint_bytes(self, rng, folder):
        return self.checkpoint(rng, folder, damage.damage_bytes)

    def checkpoint_content(self, rng, folder):
        if rng.random() < 0.05:
            return self.checkpoint(rng, folder, lambda rng, path: damage.hostile_checkpoint(path, folder / "mark"))
        return self.checkpoint(rng, folder, damage.change_checkpoint)

    def checkpoint(self, rng, folder, change):
        run = self.copy(folder, self.run)
        which = rng.choice(("latest", "latest", "latest", "best"))
        path = run / "checkpoints" / f"{which}.pt"
        if rng.random() < 0.6:
            (run / "checkpoints" / "previous.pt").unlink(missing_ok=True)
        what = self.runs.forked(change, rng, path)
        named = str(rng.choice((run, run, path)))
        reading = [["policy", named, "--episodes", "1"], ["export", named, "policy.pt2"],
                   ["model", named, "--episodes", "1", "--horizon", "3", "--windows", "4"]]  # fmt: skip
        reading = [[*words, "--checkpoint", which] for words in reading]
        if which == "latest":
            reading += [["dataset", named, "data"], None, None, None]
        words = rng.choice(reading)
        words = ["evaluate.py", *words] if words else ["train_agent.py", "--resume", named, *MORE]
        return words, what, [run], {}

    def logs(self, rng, folder):
        run = self.copy(folder, self.run)
        name = rng.choice(("episodes.csv", "eval.csv", "metrics.jsonl", "meta.json", "config.yaml"))
        if name == "meta.json" and rng.random() < 0.5:
            what = damage.change_json(rng, run / name)
        elif name.endswith(("csv", "jsonl")) and rng.random() < 0.5:
            what = damage.change_lines(rng, run / name)
        else:
            what = damage.damage_entry(rng, run, name)
        words = rng.choice((["train_agent.py", "--resume", str(run), *MORE],
                            ["evaluate.py", "compare", str(run), "--out", "compared"],
                            ["evaluate.py", "policy", str(run), "--episodes", "1"]))  # fmt: skip
        return words, what, [run], {}

    def data_set(self, rng, folder):
        data = self.copy(folder, self.data)
        change = rng.random()
        if change < 0.4:
            what = damage.damage_entry(rng, data, rng.choice(("rows.npz", "dataset.json")))
        elif change < 0.7:
            what = damage.change_json(rng, data / "dataset.json")
        else:
            what = damage.change_arrays(rng, data / "rows.npz", folder / "mark")
        updates = ("--offline.updates", "3") if rng.random() < 0.95 else ("--offline.updates", rng.choice(damage.WORDS))
        words = ["train_agent.py", "toy:cue5", "--preset", "debug", "--device", "cpu", "--train.threads", "1",
                 "--dataset", str(data), "--model-only", *updates, "--run-dir", "new"]  # fmt: skip
        return words, what, [data], {}

    def environment(self, rng, folder):
        from tests.faults import oddities

        odd, task = oddities.draw(rng), "gym:tests.faults.oddities:Odd-v0"
        words = ["train_agent.py", task, *SMALL, "--run-dir", "new"]
        words += ["--train.on-bad-step", "skip"] if rng.random() < 0.2 else []
        words += ["--train.envs", "2"] if rng.random() < 0.2 else []
        if rng.random() < 0.2:
            words = ["evaluate.py", "collect", task, "collected", "--episodes", "10"]
        return words, json.dumps(odd), [], {"ODD": json.dumps(odd)}

    def copy(self, folder, source):
        return shutil.copytree(source, folder / source.name)
