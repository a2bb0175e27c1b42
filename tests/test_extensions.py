"""Cores and exit rules of a person's own, named on the command line: those of docs/python.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agent.runs.config import Config
from agent.settings import from_dict
from world_model import LoopConfig, ModelConfig, WorldModel, make_rule

ROOT = Path(__file__).resolve().parents[1]

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "from world_model import" in block]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_cores.py").write_text("\n".join(EXAMPLES))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_cores", None)


def test_a_world_model_takes_a_core_of_ones_own(mine):
    world = WorldModel(ModelConfig(core="my_cores:Plain"), {"state": 3}, 2)
    state, stats = world.dream_step(world.initial(4), torch.zeros(4, 2), world.core.prepare())
    assert type(world.core).__name__ == "Plain"
    assert state.deter.shape == (4, 1, 128)
    assert stats.depth.tolist() == [1] * 4


def test_the_loop_takes_an_exit_rule_of_ones_own(mine):
    depths = {}
    for threshold in (1e-6, 100.0):
        loop = LoopConfig(exit="my_cores:Calm", exit_threshold=threshold, mean_loops=4.0)
        world = WorldModel(ModelConfig(loop=loop), {"state": 3}, 2)
        _, stats = world.dream_step(world.initial(4), torch.zeros(4, 2), world.core.prepare())
        depths[threshold] = stats.depth.tolist()
    assert depths == {1e-6: [8] * 4, 100.0: [1] * 4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"core": "grru"}, "did you mean gru"),
        ({"core": "lstm"}, "module:Class"),
        ({"core": "my_cores:Missing"}, "my_cores:Missing"),
        ({"core": "no_such_module:Core"}, "PYTHONPATH"),
        ({"core": "my_cores:Calm"}, "subclass of world_model.Core"),
        ({"core": "my_cores:Plain", "match": "params"}, "its own"),
    ],
)
def test_a_core_that_is_not_there_is_explained(mine, settings, words):
    with pytest.raises(ValueError, match=words):
        WorldModel(ModelConfig(**settings), {"state": 3}, 2)


def test_a_rule_that_is_not_there_is_explained(mine):
    with pytest.raises(ValueError, match="did you mean gate"):
        LoopConfig(exit="gat")
    with pytest.raises(ValueError, match="subclass of world_model.ExitRule"):
        make_rule("my_cores:Plain", 8, 2)
    with pytest.raises(Exception, match="did you mean residual"):
        from_dict(Config, {"model": {"loop": {"exit": "residul"}}})


def test_a_class_that_cannot_be_built_is_explained(mine):
    lines = [
        "from world_model import Core, ExitRule",
        "class Short(Core):",
        "    def __init__(self, loop): ...",
        "class Rule(ExitRule):",
        "    def __init__(self, flat, cap, threshold):",
        "        1 / 0",
    ]
    (mine / "my_broken.py").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"Short\(loop, sizes\): TypeError: .*flops[^()]*$"):
        WorldModel(ModelConfig(core="my_broken:Short"), {"state": 3}, 2)
    with pytest.raises(ValueError, match=r"ZeroDivisionError: .*\(my_broken.py, line 6\)"):
        make_rule("my_broken:Rule", 8, 2)


def test_the_command_line_trains_and_loads_them(mine, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(mine)}
    run = tmp_path / "run"
    train = "toy:cue --preset debug --model.loop.exit my_cores:Calm --steps 300 --no-video"

    def call(*words):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("train_agent.py", *train.split(), "--run-dir", str(run))
    assert "return" in call("evaluate.py", "policy", str(run), "--episodes", "1")
    env.pop("PYTHONPATH")
    lost = subprocess.run(
        [sys.executable, "evaluate.py", "policy", str(run)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert lost.returncode == 2
    assert "PYTHONPATH" in lost.stderr
    assert "Traceback" not in lost.stderr
