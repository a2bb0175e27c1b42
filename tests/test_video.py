"""Video files, and the strip that shows the loops of each step."""

import imageio.v3 as iio
import numpy as np
import pytest
from small import moving_square

from agent.logs.video import depth_strip, loop_colours, write_video


def test_video_round_trip_with_odd_sides(tmp_path):
    frames = np.repeat(np.linspace(30, 220, 5).astype(np.uint8), 33 * 47 * 3).reshape(5, 33, 47, 3)
    path = write_video(tmp_path / "videos" / "a.mp4", frames, fps=20)
    assert path == tmp_path / "videos" / "a.mp4"
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    back = iio.imread(path)
    assert back.shape == (5, 34, 48, 3)
    np.testing.assert_allclose(back[:, :33, :47].mean((1, 2, 3)), frames.mean((1, 2, 3)), atol=8)


def test_video_becomes_a_gif_without_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-such-program"))
    path = write_video(tmp_path / "a.mp4", moving_square(), fps=20)
    assert path == tmp_path / "a.gif"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    np.testing.assert_array_equal(iio.imread(path), moving_square())


def test_video_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        write_video(tmp_path / "a.avi", moving_square(), 20)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.gif", moving_square().astype(np.float32), 20)


@pytest.mark.parametrize("steps", [4, 16, 50])  # wider, as wide and narrower columns than one pixel
def test_depth_strip_shows_the_past_and_marks_the_present(steps):
    frames = np.full((steps, 24, 16, 3), 7, np.uint8)
    loops = np.linspace(1, 4, steps)
    out = depth_strip(frames, loops, max_loops=4)
    assert out.shape == (steps, 32, 16, 3)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out[:, :24], frames)
    white = (out[:, -1] == 255).all(-1)  # (T, W)
    np.testing.assert_array_equal(white.sum(1), 1)
    assert (np.diff(white.argmax(1)) >= 0).all()
    np.testing.assert_array_equal(out[-1, -1, 0], loop_colours(loops[:1], 4)[0])
    assert (out[0, -1, 1:] == out[0, -1, -1]).all() or steps < 16  # nothing of the future is shown


def test_loop_colours_brighten_and_clip():
    colours = loop_colours(np.array([0, 1, 2, 4, 9]), 4).astype(int).sum(-1)
    assert (np.diff(colours)[:3] > 0).all()
    assert colours[3] == colours[4]
    with pytest.raises(ValueError, match="max_loops"):
        loop_colours(np.ones(2), 0)
