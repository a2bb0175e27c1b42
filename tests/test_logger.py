"""The log of a run: means, files that survive a restart, pictures, and the terminal."""

import csv
import io
import json
import threading

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from small import moving_square
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agent.logs import logger as logger_module
from agent.logs.console import sparkline
from agent.logs.logger import Logger


def quiet(run_dir, **options):
    return Logger(run_dir, total_steps=1000, console=False, **options)


def board(run_dir):
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events


def json_lines(run_dir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, logger_module.MAX_PENDING, 2 * logger_module.MAX_PENDING + 5])
def test_write_averages_tensors_and_numbers(tmp_path, count):
    log = quiet(tmp_path)
    for i in range(count):
        log.add({"world/loss": torch.tensor(float(i)), "speed": i})
    result = log.write(10)
    assert result == pytest.approx({"world/loss": (count - 1) / 2, "speed": (count - 1) / 2})
    assert log.write(20) == {}  # every mean starts anew
    log.close()


def test_a_metric_missing_from_some_adds_is_averaged_over_the_others(tmp_path):
    log = quiet(tmp_path)
    log.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)})
    log.add({"a": torch.tensor(3.0, dtype=torch.bfloat16)})
    assert log.write(1) == {"a": 2.0, "b": 4.0}
    log.close()


def test_pending_metrics_do_not_grow_without_bound(tmp_path):
    log = quiet(tmp_path)
    for _ in range(3 * logger_module.MAX_PENDING):
        log.add({"a": torch.ones(())})
    assert len(log._pending) < logger_module.MAX_PENDING
    log.close()


def test_a_tensor_that_is_not_a_number_is_named(tmp_path):
    log = quiet(tmp_path)
    log.add({"world/kl": torch.zeros(3)})
    with pytest.raises(ValueError, match="world/kl"):
        log.write(1)
    log.close()


def test_scalars_join_the_next_line_and_keep_their_own_step_in_tensorboard(tmp_path):
    log = quiet(tmp_path)
    log.scalars(5, {"eval/return": 7.0})
    log.add({"loss": 2.0})
    assert log.write(9) == {"loss": 2.0, "eval/return": 7.0}
    log.close()
    (line,) = json_lines(tmp_path)
    assert (line["step"], line["loss"], line["eval/return"]) == (9, 2.0, 7.0)
    assert line["wall"] >= 0
    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("eval/return")] == [(5, 7.0)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(9, 2.0)]


def test_json_stays_valid_when_numbers_are_not_finite(tmp_path):
    log = quiet(tmp_path)
    log.add({"nan": torch.tensor(float("nan")), "inf": float("inf"), "ninf": -float("inf")})
    assert np.isnan(log.write(1)["nan"])  # the caller sees the real value
    log.close()
    (line,) = json_lines(tmp_path)
    assert (line["nan"], line["inf"], line["ninf"]) == (None, "Infinity", "-Infinity")


def test_close_writes_what_is_pending_and_may_be_called_twice(tmp_path):
    log = quiet(tmp_path)
    log.add({"loss": 1.0})
    log.close()
    log.close()
    assert json_lines(tmp_path)[0]["loss"] == 1.0


# --- files ---------------------------------------------------------------------------------------


def evaluation_row(episode, ret=1.5):
    return {"episode": episode, "seed": 100 + episode, "return": ret, "length": 500, "mean_loops": 1.8}


def test_csv_rows_are_on_disk_at_once(tmp_path):
    log = quiet(tmp_path)
    log.episode(500, env=1, ret=np.float32(0.1), length=250)
    log.evaluation(600, [evaluation_row(0), evaluation_row(1) | {"max_loops": 4}])
    with (tmp_path / "episodes.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["step", "env", "return", "length"]
    assert float(row["return"]) == float(np.float32(0.1))
    lines = (tmp_path / "eval.csv").read_text().splitlines()
    assert lines == [
        "step,episode,seed,return,length,mean_loops",
        "600,0,100,1.5,500,1.8",
        "600,1,101,1.5,500,1.8",
    ]
    with pytest.raises(KeyError, match="seed"):
        log.evaluation(700, [{"episode": 0}])
    log.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = quiet(tmp_path)
    for step in (100, 200, 300):
        log.episode(step, 0, float(step), 100)
        log.evaluation(step, [evaluation_row(0, step)])
        log.add({"loss": float(step)})
        log.write(step)
    log.close()
    with (tmp_path / "episodes.csv").open("a") as file:
        file.write("200,0,12")  # the process died while writing this line

    log = quiet(tmp_path, start_step=200)
    log.episode(250, 0, 2.0, 100)
    log.add({"loss": -1.0})
    log.write(250)
    log.close()

    assert (tmp_path / "episodes.csv").read_text().splitlines()[1:] == [
        "100,0,100.0,100",
        "200,0,200.0,100",
        "250,0,2.0,100",
    ]
    evaluations = (tmp_path / "eval.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in evaluations] == ["100", "200"]
    lines = json_lines(tmp_path)
    assert [line["step"] for line in lines] == [100, 200, 250]
    walls = [line["wall"] for line in lines]
    assert walls == sorted(walls)
    assert [(e.step, e.value) for e in board(tmp_path).Scalars("loss")] == [(100, 100), (200, 200), (250, -1)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_start_at_zero_keeps_the_files_it_finds(tmp_path):
    log = quiet(tmp_path)
    log.episode(10, 0, 1.0, 10)
    log.close()
    quiet(tmp_path).close()
    assert (tmp_path / "episodes.csv").read_text() == "step,env,return,length\n"
    assert "10,0,1.0,10" in (tmp_path / "episodes.csv.old").read_text()


def test_resume_refuses_a_log_with_other_columns(tmp_path):
    (tmp_path / "eval.csv").write_text("step,score\n1,2\n")
    with pytest.raises(ValueError, match="step,score"):
        quiet(tmp_path, start_step=5)


# --- TensorBoard ---------------------------------------------------------------------------------


def test_pictures_and_histograms_reach_tensorboard(tmp_path):
    log = quiet(tmp_path)
    frames = moving_square()
    log.gif(3, "dream", frames, fps=10)
    log.image(3, "curve", frames[0])
    log.histogram(3, "loops", np.array([1, 2, 2, np.nan]))
    log.histogram(3, "nothing", np.array([]))
    log.close()
    events = board(tmp_path)
    gif = events.Images("dream")[0]
    assert gif.step == 3
    np.testing.assert_array_equal(iio.imread(io.BytesIO(gif.encoded_image_string), index=None), frames)
    np.testing.assert_array_equal(iio.imread(events.Images("curve")[0].encoded_image_string), frames[0])
    assert events.Histograms("loops")[0].histogram_value.num == 3
    with pytest.raises(ValueError, match="uint8"):
        log.image(3, "curve", frames[0] / 255)


def test_hparams_stay_in_the_event_file_of_the_run(tmp_path):
    log = quiet(tmp_path)
    log.hparams({"seed": 1, "path": tmp_path, "name": "x"}, {"eval/return": None, "final": 3.0})
    log.scalars(4, {"eval/return": 5.0})
    log.close()
    assert len(list(tmp_path.glob("events*"))) == 1
    events = board(tmp_path)
    assert "_hparams_/experiment" in events.summary_metadata
    assert [e.value for e in events.Scalars("eval/return")] == [5.0]
    assert events.Scalars("final")[0].value == 3.0


# --- terminal ------------------------------------------------------------------------------------


def test_plain_lines_are_few_when_output_is_not_a_terminal(tmp_path, capsys):
    log = Logger(tmp_path, total_steps=100_000)
    log.episode(12_345, 0, 431.0, 500)
    for step in range(12_400, 13_400, 100):
        log.add({"loss": 1.0})
        log.write(step)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(" 12%  12.3k/100.0k  return ")
    assert "431" in out
    assert "\r" not in out
    log.evaluation(13_400, [evaluation_row(0, 512.0)])
    log.close()
    assert "eval 512" in capsys.readouterr().out  # the last state is always shown


def test_no_console_means_no_output(tmp_path, capsys):
    log = quiet(tmp_path)
    log.episode(1, 0, 1.0, 1)
    log.write(1)
    log.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_live_line_is_drawn_over_and_fits_the_terminal(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    log = Logger(tmp_path, total_steps=1000)
    log._console._interval = 0.0
    for step in range(100, 600, 100):
        log.add({logger_module.LOOPS_METRIC: 1.8})
        log.episode(step, 0, float(step), 100)
        log.write(step)
        log.progress(step + 50)
    log.close()
    text = terminal.getvalue()
    drawn = [part.split("\x1b[K")[0] for part in text.split("\r")[1:]]
    assert max(map(len, drawn)) <= 39
    assert any("▁" in part and "█" in part for part in drawn)
    assert text.count("\n") == 1  # at the end
    full = log._console.line()
    for word in ("return", "loops 1.8", "updates/s", "steps/s", "eta 0:00:0"):
        assert word in full
    for width in (80, 60, 45):
        short = log._console.line(width)
        assert len(short) <= width
        assert "eta" in short
    log._console.show(500, share=0.75)  # a run that is limited in time
    assert log._console.line().startswith(" 75%  ")


def test_an_evaluation_replaces_one_of_the_same_step(tmp_path):
    row = {"seed": 1, "return": 1.0, "length": 1, "mean_loops": 1.0}
    log = Logger(tmp_path, 100, console=False)
    log.evaluation(10, [{**row, "episode": 0}])
    log.evaluation(20, [{**row, "episode": i} for i in (0, 1, 2)])
    log.close()
    again = Logger(tmp_path, 100, start_step=20, console=False)  # the run went on, and its time was over at once
    again.evaluation(20, [{**row, "episode": i} for i in (7, 8)])
    again.close()
    lines = (tmp_path / "eval.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["10", "0"], ["20", "7"], ["20", "8"]]


@pytest.mark.parametrize(("name", "text"), [("eval.csv", "\n"), ("eval.csv", "x,1\n"), ("metrics.jsonl", "{}\n")])
def test_damaged_lines_are_left_out_and_kept_beside(tmp_path, capsys, name, text):
    log = Logger(tmp_path, 100, console=False)
    log.episode(5, 0, 1.0, 5)
    log.write(5)
    log.evaluation(5, [evaluation_row(0)])
    log.close()
    whole = (tmp_path / name).read_text()
    (tmp_path / name).write_text(whole + text)
    log = Logger(tmp_path, 100, start_step=10, console=False)
    assert f"{name} has 1 damaged line" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == whole
    assert (tmp_path / f"{name}.damaged").read_text() == whole + text
    log.close()


def test_output_stays_ascii_where_the_terminal_is(tmp_path, monkeypatch):
    terminal = Terminal()
    terminal.encoding = "ascii"
    monkeypatch.setattr("sys.stdout", terminal)
    log = Logger(tmp_path, total_steps=10)
    log.episode(1, 0, 1.0, 1)
    log.close()
    assert "return" in terminal.getvalue()
    assert terminal.getvalue().isascii()


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(100)), 8)) == 8
    assert len(set(sparkline([5.0, 5.0], 8))) == 1
    assert sparkline([float("nan")], 8) == ""
    assert sparkline([0.0, 1.0], 8, blocks=False).isascii()


def test_a_full_disk_under_tensorboards_thread_is_no_traceback(tmp_path, monkeypatch):
    """Its error is raised again where the next event is added, and is not to be printed twice."""
    shown = []
    monkeypatch.setattr(threading, "__excepthook__", shown.append)
    monkeypatch.setattr(threading, "excepthook", shown.append)
    Logger(tmp_path, 100, console=False).close()
    for error in (OSError(28, "No space left on device"), ValueError("a bug")):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
    assert [failure.exc_type for failure in shown] == [ValueError]
