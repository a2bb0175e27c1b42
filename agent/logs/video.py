"""Videos: .mp4 files, GIFs, and a strip below the frames that shows how many loops each step took.

Frames are always uint8 arrays (T, H, W, 3): time, height, width, red-green-blue.
"""

import io
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np

# Nine evenly spaced colours of matplotlib's "magma"; between them colours are interpolated.
_MAGMA = np.array(
    [
        [0, 0, 4],
        [29, 17, 71],
        [81, 18, 124],
        [131, 38, 129],
        [183, 55, 121],
        [231, 82, 99],
        [252, 137, 97],
        [254, 196, 136],
        [252, 253, 191],
    ],
    dtype=np.float64,
)
_FUTURE = np.array([40, 44, 52], dtype=np.uint8)  # strip colour of later steps
_CURRENT = np.array([255, 255, 255], dtype=np.uint8)  # strip colour of the current step


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Return `frames` as an array; ValueError unless it is uint8 (T, H, W, 3) with T, H, W >= 1."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    return frames


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Encode frames (T, H, W, 3) uint8 as an endless GIF; `fps` is frames per second, at most 50.

    GIF counts time in hundredths of a second and viewers play anything under two of them slowly,
    so faster clips are slowed down to 50 frames per second.
    """
    duration = max(20, 10 * round(100 / fps))  # milliseconds per frame
    buffer = io.BytesIO()
    iio.imwrite(buffer, check_frames(frames), extension=".gif", plugin="pillow", duration=duration, loop=0)
    return buffer.getvalue()


def write_video(path: Path | str, frames: np.ndarray, fps: float) -> Path:
    """Write frames (T, H, W, 3) uint8 at `fps` frames per second and return the path that was written.

    The suffix of `path` chooses .mp4 (H.264) or .gif. Where no working ffmpeg is found an .mp4 becomes
    a .gif beside it. The file appears under its name only when it is complete; missing folders are made.
    Raises ValueError for other suffixes or frames of another shape.
    """
    path, frames = Path(path), check_frames(frames)
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"videos end in .mp4 or .gif, got {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        # ffmpeg goes by the suffix, so the temporary name keeps it.
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            _write_mp4(temporary, frames, fps)
            os.replace(temporary, path)
            return path
        except (ImportError, RuntimeError, OSError):
            path = path.with_suffix(".gif")  # no ffmpeg, or one without H.264
        finally:
            temporary.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    temporary.write_bytes(encode_gif(frames, fps))
    os.replace(temporary, path)
    return path


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode H.264 in the pixel format that every player knows; it needs even sides."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    iio.imwrite(
        path,
        frames,
        plugin="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=2,
        ffmpeg_log_level="error",
    )


def loop_colours(loops: np.ndarray, max_loops: float) -> np.ndarray:
    """Colour loop counts: `loops` (...) of any shape -> uint8 (..., 3), dark for few, bright for many.

    Counts are measured against `max_loops` and clipped to it. Raises ValueError when it is below 1.
    """
    if max_loops < 1:
        raise ValueError(f"max_loops must be at least 1, got {max_loops}")
    position = np.clip(np.asarray(loops, dtype=np.float64) / max_loops, 0.0, 1.0) * (len(_MAGMA) - 1)
    channels = [np.interp(position, np.arange(len(_MAGMA)), _MAGMA[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def depth_strip(frames: np.ndarray, loops: np.ndarray, max_loops: float) -> np.ndarray:
    """Draw under each frame how many loops every step took so far.

    `frames` (T, H, W, 3) uint8, `loops` (T,) loops used at the step each frame shows. The strip runs over
    the width of the frame, one column per step (several pixels or a fraction of one); the steps up to the
    current one are coloured by `loop_colours`, the current one is marked white, later ones are grey.
    Returns uint8 (T, H + S, W, 3) with a strip of S = max(8, H // 12) rows.
    Raises ValueError when the lengths differ or `max_loops` is below 1.
    """
    frames, loops = check_frames(frames), np.asarray(loops)
    steps, height, width = frames.shape[:3]
    if loops.shape != (steps,):
        raise ValueError(f"loops must hold one number for each of {steps} frames, got shape {loops.shape}")
    rows = max(8, height // 12)
    shown_step = np.arange(width) * steps // width  # (W,) the step that each pixel column shows
    colours = loop_colours(loops, max_loops)[shown_step]  # (W, 3)
    now = np.arange(steps)[:, None]
    line = np.where((shown_step <= now)[..., None], colours, _FUTURE)  # (T, W, 3)
    marker = np.arange(steps) * width // steps  # (T,) pixel column of the current step
    line[np.arange(steps), marker] = _CURRENT
    strip = np.broadcast_to(line[:, None], (steps, rows, width, 3))
    return np.concatenate([frames, strip], axis=1)
