"""benchmarks/learning_rates.py: which runs diverged, how large states became, and errors by depth."""

import json
import sys

import pytest
import yaml
from conftest import benchmark


@pytest.fixture
def rates():
    return benchmark("learning_rates")


def run_of(folder, seed, errors, norms, core="looped", retention="constrained", meta=None):
    """A run whose measurements have these errors one step ahead, and whose metrics these norms."""
    folder.mkdir(parents=True)
    model = {"core": core, "loop": {"retention": retention}}
    settings = {"model": model, "optimizer": {"lr": 0.003}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "meta.json").write_text(json.dumps(meta or {"finished": True}))
    rows = [f"{update},exit,1.5,{h},{error}" for update, error in enumerate(errors) for h in (1, 5, 15)]
    (folder / "open_loop.csv").write_text("\n".join(["update,depth,loops,horizon,error", *rows, "9,2,2,1,77.0", ""]))
    lines = [{"stability/norm_1": x, "stability/dream_norm_5": 2 * x if isinstance(x, float) else x} for x in norms]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_counts_what_diverged_and_averages_the_rest(rates, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "runs" / "a", 10, [0.5, 0.2], [3.0, 1.0])
    run_of(tmp_path / "runs" / "b", 11, [0.4], [2.0])
    run_of(tmp_path / "runs" / "c", 12, [1.2], [9.0])  # worse than the mean
    ended = {"finished": False, "not_finite": "world/kl"}
    run_of(tmp_path / "runs" / "d", 13, [0.3], [5.0, None, "Infinity"], meta=ended)
    run_of(tmp_path / "runs" / "e", 10, [0.1], [1.0], retention="free")
    run_of(tmp_path / "runs" / "f", 10, [0.6], [1.0], core="certified")
    words = str(tmp_path / "runs"), "--csv", str(tmp_path / "rates.csv")
    monkeypatch.setattr(sys, "argv", ["learning_rates.py", *words])
    assert rates.main() == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    errors = " | ".join(["0.300 (0.200 to 0.400)"] * 3)
    assert lines[1] == f"| constrained | 0.003 | 2 of 4 | 9.0 | 18.0 | {errors} |"
    assert lines[0].startswith("| certified | 0.003 | 0 of 1 | 1.0 | 2.0 | 0.600")
    assert lines[2].startswith("| free | 0.003 | 0 of 1 | 1.0 | 2.0 | 0.100")
    rows = (tmp_path / "rates.csv").read_text().splitlines()
    assert rows[0] == "core,lr,seed,loop_norm,dream_norm,diverged,error_1,error_5,error_15"
    assert rows[1:3] == ["constrained,0.003,10,3,6,0,0.2,0.2,0.2", "constrained,0.003,11,2,4,0,0.4,0.4,0.4"]


def test_a_run_that_was_interrupted_has_not_diverged(rates, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "runs" / "a", 10, [0.5], [3.0], meta={"finished": False})
    words = str(tmp_path / "runs"), "--csv", str(tmp_path / "rates.csv")
    monkeypatch.setattr(sys, "argv", ["learning_rates.py", *words])
    assert rates.main() == 2
    assert "was interrupted" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--picture", "x.png"])
    with pytest.raises(SystemExit):
        rates.main()
    assert "give --depths too" in capsys.readouterr().err


def test_errors_by_depth_are_those_of_a_real_model(rates, tmp_path, monkeypatch, finished, script):
    data = tmp_path / "data"
    assert script("evaluate.py", "dataset", finished[0], data).returncode == 0
    words = ["--depths", "3", str(data), str(finished[0]), "--csv", str(tmp_path / "depth.csv")]
    monkeypatch.setattr(sys, "argv", ["learning_rates.py", *words, "--picture", str(tmp_path / "depth.png")])
    assert rates.main() == 0
    head, *rows = (tmp_path / "depth.csv").read_text().splitlines()
    assert head.startswith("core,seed,depth,error_1")
    assert [row.split(",")[2] for row in rows] == ["1", "2", "3"]
    errors = [float(row.split(",")[3]) for row in rows]
    assert all(error > 0 for error in errors)
    assert len(set(errors)) == 3  # the depth is what is computed
    assert (tmp_path / "depth.png").stat().st_size > 1000
