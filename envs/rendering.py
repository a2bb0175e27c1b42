"""Which OpenGL backend draws MuJoCo scenes on this computer, found out before it can do harm.

MuJoCo and dm_control read the environment variable MUJOCO_GL once, when they are first imported. A wrong
value breaks the import, and no value on a computer without a screen kills the process at the second
frame. So the choice is made before the import, and tried in another process.
"""

import os
import subprocess
import sys
import tempfile

from envs.errors import TaskError

VARIABLE = "MUJOCO_GL"
OFF = "disable"
_OFF_NAMES = ("off", "disable", "disabled", "false", "0")
_PROBE_SECONDS = 60

NO_BACKEND = (
    "no OpenGL backend works here, so MuJoCo scenes cannot be drawn; on Debian or Ubuntu install "
    "'libegl1 libegl-mesa0 libgl1-mesa-dri' (or 'libosmesa6') with apt and start again"
)
_TOO_LATE = (
    "drawing was switched off when dm_control was first imported in this process; "
    "call prepare_rendering(True) before the first environment is made"
)

# One frame through the same library calls that a video makes.
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='.1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
assert renderer.render().shape == (16, 16, 3)
print("drawn", flush=True)
"""

_works: dict[str, bool] = {}  # the result of the probe of each backend, which takes up to a second
_chosen_here = False  # True when MUJOCO_GL holds our choice and not the user's
_users_broken: str | None = None  # what the user had chosen and does not work


def rendering_backend() -> str | None:
    """Find an OpenGL backend that draws without a screen.

    Draws one 16x16 frame in a subprocess with 'egl', then 'osmesa', then 'glfw' (only where there is a
    display) and remembers the answer. MUJOCO_GL of this process is neither read nor changed.

    Returns:
        The name of the first backend that works, or None.
    """
    return next((backend for backend in _candidates() if _backend_works(backend)), None)


def prepare_rendering(want: bool) -> str | None:
    """Choose MUJOCO_GL. Call it once before any environment is made; more calls do no harm.

    A value set by the user is kept if it works. Otherwise the variable becomes the backend that `rendering_backend`
    found if `want`, and 'disable' if nothing works or nothing is to be drawn: training needs no OpenGL.

    Args:
        want: whether this process will ever draw a MuJoCo scene, for example for a video.

    Returns:
        None if all is well, else one line that says why nothing can be drawn and what to install or change.
        Print it and leave the video out; environments made without `render=True` still work.
    """
    global _chosen_here, _users_broken
    current = os.environ.get(VARIABLE) or None  # an empty value is read as no choice
    users_choice = current is not None and not _chosen_here
    if users_choice and not _is_off(current) and not _backend_works(current):
        # Importing dm_control would fail, even where nothing is to be drawn.
        os.environ[VARIABLE], _chosen_here, _users_broken = OFF, True, current
    if _users_broken:
        return _broken(_users_broken) if want else None
    if not want:
        if current is None:
            os.environ[VARIABLE], _chosen_here = OFF, True
        return None
    if users_choice and _is_off(current):
        return f"{VARIABLE}={current} switches drawing off; unset it and a backend is chosen for you"
    imported = sys.modules.get("dm_control._render")
    if imported is not None:  # the choice is made for this process, whatever the variable says now
        bound = getattr(imported, "BACKEND", None)
        if bound is not None and not _is_off(bound) and _backend_works(bound):
            return None
        return _TOO_LATE if rendering_backend() else NO_BACKEND
    if users_choice:
        return None
    backend = rendering_backend()
    os.environ[VARIABLE], _chosen_here = backend or OFF, True
    return None if backend else NO_BACKEND


def explain_import_error(error: Exception) -> TaskError:
    """Turn a failed import of dm_control or MuJoCo into a `TaskError` that names the likely cause."""
    current = os.environ.get(VARIABLE)
    if current and not _is_off(current):
        return TaskError(f"{_broken(current)} ({type(error).__name__}: {error})")
    return TaskError(
        f"dm_control cannot be imported ({type(error).__name__}: {error}); "
        "its versions must fit together: pip install dm-control==1.0.50 mujoco==3.17.0"
    )


def _broken(backend: str | None) -> str:
    return f"{VARIABLE}={backend} does not work here; unset it and a backend that works is chosen for you"


def _is_off(backend: str | None) -> bool:
    return backend is not None and backend.strip().lower() in _OFF_NAMES


def _candidates() -> list[str]:
    if not sys.platform.startswith("linux"):
        return ["glfw"]  # the native window system of macOS and Windows needs no display variable
    return ["egl", "osmesa"] + (["glfw"] if os.environ.get("DISPLAY") else [])


def _backend_works(backend: str | None) -> bool:
    """Draw one frame in another process: a broken OpenGL library can abort the process that tries it."""
    if backend is None:
        return False
    if backend not in _works:
        try:
            with tempfile.TemporaryDirectory() as folder:  # MuJoCo leaves a log file where it fails
                probe = subprocess.run(
                    [sys.executable, "-c", _PROBE],
                    cwd=folder,
                    env={**os.environ, VARIABLE: backend},
                    capture_output=True,
                    text=True,
                    timeout=_PROBE_SECONDS,
                    check=False,
                )
            # Not the exit status: some drivers crash while closing, after a good frame.
            _works[backend] = "drawn" in probe.stdout
        except (subprocess.TimeoutExpired, OSError):
            _works[backend] = False
    return _works[backend]
