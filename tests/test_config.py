"""Settings: presets, the command line, YAML."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from agent.errors import UsageError
from agent.runs.cli import load_yaml, parse_cli, save_yaml
from agent.runs.config import Config
from agent.runs.presets import PRESETS, preset
from agent.runtime import resolve_device
from agent.settings import from_dict, parse_count, to_dict
from envs import TaskId


def cli(*words):
    config, saved = parse_cli(words)
    assert saved is None
    return config


def refusal(capsys, *words):
    """The message of a command line that is refused with status 2."""
    with pytest.raises(SystemExit) as stop:
        parse_cli(words)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_small_is_the_default_of_the_dataclasses():
    assert preset("small") == Config()
    assert cli("toy:cue", "--device", "cpu") == Config(task="toy:cue", device="cpu")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_themselves_and_survive_yaml(name, tmp_path):
    config = preset(name)
    assert config.preset == name
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == config


def test_options_are_spelt_with_either_dash():
    one = cli("toy:cue", "--model.loop.max-loops", "7", "--run-dir", "here", "--no-video")
    other = cli("toy:cue", "--model.loop.max_loops=7", "--run_dir", "here", "--no-video")
    assert one == other
    assert (one.model.loop.max_loops, one.run_dir, one.video, one.task) == (7, "here", False, "toy:cue")


def test_a_preset_is_the_base_of_what_else_is_given():
    config = cli("toy:cue", "--behavior.horizon", "9", "--preset", "debug", "--steps", "2k")
    debug = preset("debug")
    expected = replace(
        debug, task="toy:cue", behavior=replace(debug.behavior, horizon=9), train=replace(debug.train, steps=2000)
    )
    assert config == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [("100_000", 100_000), ("1e5", 100_000), ("100k", 100_000), ("0.5M", 500_000), ("16.1k", 16_100), ("-3", -3)],
)
def test_whole_numbers_as_people_write_them(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["1.5", "", "k", "inf", "nan", "ten", "1e400", "1e999999999"])
def test_what_is_not_a_whole_number(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--behavior.horizn", "3"], "--behavior.horizon"),
        (["--step", "3"], "--steps"),
        (["--steps", "many"], "is not a whole number"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--behavior.horizon", "0"], "horizon must be at least 1, got 0"),
        (["--eval.episodes", "0"], "episodes must be at least 1, got 0"),
        (["--train.ratio", "-1"], "ratio must be 0 or more"),
        (["--train.ratio", "nan"], "ratio must be 0 or more"),
        (["--train.length", "2000"], "prefill must be at least 2001"),
        (["--behavior.starts", "3"], "starts must be 0 (all) or at least 32, two rows of each of the 16"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--preset", "huge"], "invalid choice 'huge'"),
        (["one", "two"], "two"),
    ],
)
def test_bad_options_are_refused_with_a_reason(words, message, capsys):
    assert message in refusal(capsys, "--device", "cpu", *words)


def test_every_option_has_a_help_text():
    def fields(kind, path=""):
        for field in dataclasses.fields(kind):
            default = getattr(kind(), field.name)
            if dataclasses.is_dataclass(default):
                yield from fields(type(default), f"{path}{field.name}.")
            else:
                yield f"{path}{field.name}", kind, field.name

    import inspect

    for path, kind, name in fields(Config):
        source = inspect.getsource(kind)
        line = next(i for i, text in enumerate(source.splitlines()) if text.startswith(f"    {name}:"))
        assert source.splitlines()[line + 1].strip().startswith('"""'), f"{path} has no docstring"


def test_yaml_values_are_converted_by_annotation(tmp_path):
    path = tmp_path / "config.yaml"
    text = "optimizer:\n  lr: 3e-4\ntrain:\n  steps: 1e5\n  ratio: 1\nmodel:\n  loop:\n    max_loops: '8'\n"
    path.write_text(text)
    config = load_yaml(path)
    assert config.optimizer.lr == 3e-4
    assert config.train.steps == 100_000
    assert isinstance(config.train.steps, int)
    assert isinstance(config.train.ratio, float)
    assert config.model.loop.max_loops == 8


def test_lists_of_a_yaml_file_become_tuples_of_their_type(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  loop:\n    exit_histogram: ['1e-1', 2, 0.5]\n")
    config = load_yaml(path)
    assert config.model.loop.exit_histogram == (0.1, 2.0, 0.5)
    assert all(isinstance(weight, float) for weight in config.model.loop.exit_histogram)
    save_yaml(config, path)
    assert load_yaml(path) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agent": ["sac"]}, r"agent cannot be \['sac'\]; expected dreamer or "),
        ({"model": {"loop": {"exit_histogram": ["many"]}}}, r"exit_histogram\[0\] cannot be 'many'"),
        ({"model": {"loop": {"exit_histogram": [1, True]}}}, r"exit_histogram\[1\] cannot be True"),
        ({"model": {"loop": {"exit_histogram": "1"}}}, "exit_histogram cannot be '1'; expected a list"),
        ({"trian": {}}, "did you mean train"),
        ({"train": {"stepz": 1}}, "did you mean train.steps"),
        ({"train": 3}, "train must hold"),
        ({"train": {"steps": "many"}}, "train.steps cannot be 'many'"),
        ({"train": {"steps": True}}, "train.steps cannot be True"),
        ({"video": "yes"}, "video cannot be 'yes'"),
        ({"preset": "huge"}, "preset cannot be 'huge'"),
        ({"task": None}, "task cannot be None"),
        ({"behavior": {"horizon": 0}}, "horizon must be at least 1"),
        ({"model_only": True, "dataset": "d", "train": {"sampling": "recent"}}, "no newest rows: give .* uniform"),
        ({"model_only": True, "dataset": "d", "train": {"sampling": "value-error"}}, "no critic: give "),
    ],
)
def test_bad_yaml_names_the_setting(values, message):
    with pytest.raises(UsageError, match=message):
        from_dict(Config, values)


def test_files_that_are_not_yaml(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_yaml(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="cannot be read"):
        load_yaml(tmp_path / "bad.yaml")


def test_a_run_starts_from_the_config_file_of_another(finished):
    file = finished[0] / "config.yaml"
    saved = load_yaml(file)
    assert saved.task == "toy:cue5"
    assert cli("--config", str(file)) == replace(saved, run_dir=None, resume=None)


def test_run_dir_and_resume_of_a_config_file_are_ignored(tmp_path):
    save_yaml(replace(preset("debug"), run_dir="there", resume="there"), tmp_path / "config.yaml")
    assert cli("toy:cue", "--config", str(tmp_path / "config.yaml")) == replace(preset("debug"), task="toy:cue")


def test_options_stand_above_the_config_file_and_the_file_above_its_preset(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("preset: debug\noptimizer:\n  lr: 3e-4\nbehavior:\n  horizon: 7\n  units: 48\n")
    config = cli(f"--config={file}", "toy:cue", "--behavior.horizon", "9")
    debug = preset("debug")
    assert config == replace(
        debug, task="toy:cue", optimizer=replace(debug.optimizer, lr=3e-4),
        behavior=replace(debug.behavior, horizon=9, units=48),
    )  # fmt: skip
    assert cli("toy:cue", "--config", str(file), "--preset", "debug").behavior.units == 48
    file.write_text("behavior:\n  units: 48\n")
    mine = cli("toy:cue", "--preset", "debug", "--config", str(file))
    assert mine == replace(debug, task="toy:cue", behavior=replace(debug.behavior, units=48))
    file.write_text("task: dmc:walker_walk@pixels\n")
    assert parse_cli(["--device", "cpu", "--config", str(file)], TaskId.shows_images)[0].preset == "pixels"
    file.write_text("")
    assert cli("toy:cue", "--device", "cpu", "--config", str(file)) == Config(task="toy:cue", device="cpu")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("behavior:\n  horizn: 7\n", (), "there is no setting behavior.horizn; did you mean behavior.horizon"),
        ("trian: 7\n", (), "did you mean train"),
        ("train: 7\n", (), "train must hold"),
        ("preset: huge\n", (), "preset cannot be 'huge'"),
        ("preset: debug\n", ("--preset", "small"), "has the settings of preset 'debug': leave --preset small out"),
        ("behavior:\n  horizon: 0\n", (), "horizon must be at least 1"),
        ("- 1\n", (), "must hold names with values"),
        ("a: [", (), "it is no YAML"),
        ("", ("--resume", "x"), "give one of the two"),
    ],
)
def test_bad_config_files_are_refused_in_one_line(tmp_path, text, words, message):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as refused:
        parse_cli(["--config", str(file), *words])
    assert "\n" not in str(refused.value)


def test_a_missing_config_file_and_the_help(script):
    for words in (("missing.yaml",), ()):
        done = script("train_agent.py", "--config", *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert "--config FILE" in script("train_agent.py", "--help").stdout


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "meta", ""):
        with pytest.raises(UsageError, match="expected auto, cpu or cuda"):
            resolve_device(name)


def test_an_absent_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="--device cuda: no CUDA device here; use --device cpu"):
        resolve_device("cuda")


def test_a_gpu_changes_the_default_preset(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli("toy:cue").preset == "base"
    assert cli("toy:cue", "--device", "cpu").preset == "small"
    assert cli("toy:cue", "--preset", "debug").preset == "debug"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli("toy:cue").preset == "small"


def test_tasks_of_images_have_a_preset_of_their_own_on_a_cpu(monkeypatch):
    def chosen(*words):
        return parse_cli(words, TaskId.shows_images)[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pixels = chosen("--seed", "3", "dmc:walker_walk@pixels")
    assert pixels == replace(preset("pixels"), task="dmc:walker_walk@pixels", seed=3)
    assert pixels.preset == "pixels"
    assert pixels.model.image.anneal
    assert preset("base").model.image.anneal
    assert chosen("atari100k:pong", "--train.length", "12").train.length == 12
    for words in ("dmc:walker_walk", "gym:CartPole-v1", "atari:pong --preset small", "toy:cue --seed 1"):
        assert chosen(*words.split()).preset == "small"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("atari:pong").preset == "base"


def test_configs_are_plain_values():
    def plain(value):
        if isinstance(value, dict):
            return all(plain(each) for each in value.values())
        if isinstance(value, tuple):
            return all(plain(each) for each in value)
        return value is None or isinstance(value, str | int | float | bool)

    assert plain(to_dict(Config()))


# ---------------------------------------------------------------------- files of earlier versions


def test_settings_that_went_are_read_where_they_say_what_holds_today():
    plain = to_dict(Config())
    old = {
        **plain,
        "model": {**plain["model"], "dyn_scale": 1.0, "image": {**plain["model"]["image"], "objective": "decode"}},
        "behavior": {**plain["behavior"], "replay_value_scale": 0.3},
    }
    assert from_dict(Config, old) == Config()
    with pytest.raises(UsageError, match="no setting model.dyn_scale"):
        from_dict(Config, {"model": {"dyn_scale": 0.5}})
    with pytest.raises(UsageError, match="no setting model.image.objective"):
        from_dict(Config, {"model": {"image": {"objective": "redundancy"}}})


@pytest.mark.parametrize(("plan", "decisions", "candidates"), [(0, "actor", 64), (32, "both", 32)])
def test_a_number_of_candidates_once_turned_planning_on(plan, decisions, candidates):
    later = "decisions", "plan_candidates"
    behavior = {k: v for k, v in to_dict(Config())["behavior"].items() if k not in later} | {"plan": plan}
    found = from_dict(Config, {"behavior": behavior}).behavior
    assert (found.decisions, found.plan_candidates) == (decisions, candidates)
    named = from_dict(Config, {"behavior": behavior | {"decisions": "plan", "plan": 32}}).behavior
    assert (named.decisions, named.plan_candidates) == ("plan", 32)
