"""What `reset` and `step` of an environment returned, taken apart and checked; every error says what to change."""

from typing import Any

import numpy as np

from envs.errors import BadReturn

NUMERIC = "fiub"
"""Kinds of numpy types that can be read as real numbers."""

_SHIMMY = (
    "an environment of old Gym can be wrapped as it is: pip install 'shimmy[gym-v21]' and "
    "gymnasium.make('GymV21Environment-v0', env=...) in the function that is registered"
)


def split_reset(returned: Any) -> Any:
    """The observation of what `reset` returned; the info may be anything."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2 and not _is_vector(returned):
        return returned[0]
    raise BadReturn(
        f"reset() returned {described(returned)}, and Gymnasium's returns two things: "
        f"return observation, {{}}; {_SHIMMY}"
    )


def split_step(returned: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Observation, reward, terminated, truncated and info of what `step` returned; the info may be anything."""
    if isinstance(returned, (tuple, list)) and len(returned) == 5:
        return returned  # type: ignore[return-value]
    count = f"{len(returned)} values" if isinstance(returned, (tuple, list)) else described(returned)
    old = f" (old Gym's done is terminated, where no time limit was meant); {_SHIMMY}" if count == "4 values" else ""
    raise BadReturn(
        f"step() returned {count}, and Gymnasium's returns five: "
        f"return observation, reward, terminated, truncated, {{}}{old}"
    )


def explain_reset(error: TypeError) -> BadReturn | None:
    """Why a reset cannot be called with Gymnasium's arguments; None where the error has another reason."""
    text = str(error)
    for argument in ("seed", "options"):
        if f"reset() got an unexpected keyword argument '{argument}'" in text:
            return BadReturn(
                f"its reset takes no {argument}: write def reset(self, *, seed=None, options=None), and call "
                f"super().reset(seed=seed) in it; {_SHIMMY}"
            )
    return None


def number(value: Any) -> float:
    """A reward: a number, or an array of one."""
    try:
        if isinstance(value, (float, int, np.floating, np.integer)):
            return float(value)
        array = as_array(value)
        if array is not None and array.size == 1 and array.dtype.kind in NUMERIC:
            return float(array.item())
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise BadReturn(f"the reward is {described(value)}, and one number is needed: return float(...) of one")


def flag(value: Any, name: str) -> bool:
    """`terminated` or `truncated`: True or False, as numpy's or as a number too, or an array of one of these."""
    if value is True or value is False:
        return bool(value)
    array = as_array(value)
    if array is not None and array.size == 1 and array.dtype.kind in NUMERIC and array.item() in (0, 1):
        return bool(array.item())
    raise BadReturn(f"{name} is {described(value)}, and True or False is needed")


def as_array(value: Any) -> np.ndarray | None:
    """The value as an array; None where it cannot be one."""
    try:
        return np.asarray(value)
    except Exception:  # uneven lists; what arrays of other libraries raise
        return None


def described(value: Any) -> str:
    """A value in few words."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if isinstance(value, dict):
        return f"a dictionary with {names_of(value)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def names_of(keys: Any) -> str:
    """Names of entries for a message, at most eight of them."""
    names = [repr(key) for key in keys]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "no entries"


def _is_vector(returned: Any) -> bool:
    """Whether two values are an observation of two numbers, as old Gym returned it, rather than one with an info."""
    return all(isinstance(part, (float, int, np.floating, np.integer)) for part in returned)
