"""Observations of any Gymnasium space as one vector of numbers and images, checked against the space they announce."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.checks import NUMERIC, as_array, described, names_of
from envs.errors import BadReturn, TaskError
from envs.images import can_be_image, check_image, image_space, kind_of, resized

OBSERVATIONS_HELP = (
    "supported are Box (vectors, uint8 images), Discrete, MultiDiscrete, MultiBinary, Dict of these, Tuple of vectors"
)
MOST_ONE_HOT = 16
"""Different codes of a grid up to which each cell is one-hot."""
MOST_NUMBERS = 4096
"""Numbers of a grid up to which it becomes part of a vector without being asked for."""
VARIANTS = ("grid", "image")
"""Variants of a gym task that choose how arrays of integers are read."""

Write = Callable[[Any, np.ndarray], None]
"""write(value, out): check one part of an observation, and write its numbers to out (size,)."""


class ObservationReader:
    """Reads observations of `space` as {"state": (S,) float32} and images, see `GymAdapter`.

    name: of the task, for messages; variant: "grid" or "image", which then holds for every array that may be either.
    Raises TaskError for spaces that cannot be read.

    Attributes:
        space: of what is read.
        notes: one line for each array that is shown otherwise than one might expect.
    """

    def __init__(self, space: spaces.Space[Any], name: str, variant: str = ""):
        self.outer, self.name, self.variant = space, name, variant
        self.notes: list[str] = []
        self.chosen = False  # whether the variant changes anything
        self.images: dict[str, spaces.Box] = {}
        rest = self._split_images()
        entries: dict[str, spaces.Space[Any]] = {
            key: image_space(check_image(part, name, variant)) for key, part in self.images.items()
        }
        self.size = 0
        self.write: Write | None = None
        if rest is not None:
            self.size, self.write = self._part(rest, "observation")
            entries["state"] = spaces.Box(-np.inf, np.inf, shape=(self.size,), dtype=np.float32)
        if self.size == 0 and not self.images:
            raise TaskError(f"{name} has an empty observation; {OBSERVATIONS_HELP}")
        if variant and not self.chosen:
            raise TaskError(f"{name} observes no grid and no image: leave @{variant} out")
        self.space = spaces.Dict(entries)

    def __call__(self, observation: Any) -> dict[str, np.ndarray]:
        """Raises BadReturn where the observation is not of its space."""
        seen: dict[str, np.ndarray] = {}
        rest = observation
        if self.images:
            if isinstance(self.outer, spaces.Dict):
                check_entries(observation, self.outer.spaces, "observation")
                rest = {key: value for key, value in observation.items() if key not in self.images}
            for key, space in self.images.items():
                seen[key] = self._picture(observation[key] if rest is not observation else observation, space, key)
        if self.write is not None:
            seen["state"] = np.empty(self.size, np.float32)
            self.write(rest, seen["state"])
        return seen

    # ------------------------------------------------------------------ images

    def _split_images(self) -> spaces.Space[Any] | None:
        """Note the images; returns the space of all other entries, None where there are none."""
        space = self.outer
        if kind_of(space, self.variant) == "image":
            self._add_image("image", space)
            return None
        if not isinstance(space, spaces.Dict):
            return space
        for key, part in space.spaces.items():
            if kind_of(part, self.variant) == "image":
                if key == "state" or "." in key:
                    raise TaskError(
                        f"{self.name} calls an image {key!r}: rename it; 'state' is the name of all vectors together"
                    )
                self._add_image(key, part)
        rest = {key: part for key, part in space.spaces.items() if key not in self.images}
        return spaces.Dict(rest) if rest else None

    def _add_image(self, key: str, space: spaces.Space[Any]) -> None:
        assert isinstance(space, spaces.Box)
        self.images[key] = space
        if self.variant == "image":
            self.chosen = True
            self.notes.append(
                f"image        {key}, {sides(space)}, is resized to 64 x 64; {self.name}@grid reads it number by number"
            )

    def _picture(self, value: Any, space: spaces.Box, key: str) -> np.ndarray:
        image = as_array(value)
        if image is None or (image.shape, image.dtype) != (space.shape, space.dtype):
            what = f"the image {key!r}" if isinstance(self.outer, spaces.Dict) else "the image"
            raise BadReturn(
                f"{what} is {described(value if image is None else image)}, but its observation space says "
                f"{space.shape} and {space.dtype}"
            )
        brightest = int(space.high.max())
        if self.variant == "image" and 0 < brightest < 128:  # codes: spread over the range of an image
            image = image.astype(np.uint8) * np.uint8(255 // brightest)
        return resized(image)

    # ------------------------------------------------------------------ vectors

    def _part(self, space: spaces.Space[Any], label: str) -> tuple[int, Write]:
        """How many numbers a part of the observation has, and the function that reads it."""
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            return self._parts(space, label)
        if isinstance(space, spaces.Discrete):
            return int(space.n), one_choice(int(space.start), int(space.n), label)
        if isinstance(space, spaces.MultiDiscrete):
            return int(space.nvec.sum()), one_hot(space.start, space.nvec, label)
        if isinstance(space, spaces.MultiBinary):
            return math.prod(space.shape), plain(space.shape, label)
        if not isinstance(space, spaces.Box) or space.dtype is None or space.dtype.kind not in NUMERIC:
            raise TaskError(f"{self.name} has the observation space {space}; {OBSERVATIONS_HELP}")
        kind = kind_of(space, self.variant)
        if kind == "image":
            raise TaskError(f"{self.name} has an image inside another Dict or Tuple; {OBSERVATIONS_HELP}")
        self.chosen |= self.variant == "grid" and len(space.shape) >= 2
        return self._grid(space, label) if kind == "grid" else (math.prod(space.shape), plain(space.shape, label))

    def _parts(self, space: spaces.Dict | spaces.Tuple, label: str) -> tuple[int, Write]:
        items = list(space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces))
        parts: list[tuple[Any, slice, Write]] = []
        size = 0
        for key, part in items:
            numbers, write = self._part(part, f"{label}[{key!r}]")
            parts.append((key, slice(size, size + numbers), write))
            size += numbers
        named = space.spaces if isinstance(space, spaces.Dict) else None

        def write_all(value: Any, out: np.ndarray) -> None:
            if named is not None:
                check_entries(value, named, label)
            elif not isinstance(value, (tuple, list)) or len(value) != len(parts):
                raise BadReturn(f"{label} is {described(value)}, and a tuple of {len(parts)} is needed")
            for key, where, write in parts:
                write(value[key], out[where])

        return size, write_all

    def _grid(self, space: spaces.Box, label: str) -> tuple[int, Write]:
        """Few codes are one-hot; more, and those of grids that would be too large so, stay single numbers."""
        cells, low, high = math.prod(space.shape), int(space.low.min()), int(space.high.max())
        count = high - low + 1
        few = 2 < count <= MOST_ONE_HOT and cells * count <= MOST_NUMBERS
        shown = f"; {self.name}@image shows a picture of 64 x 64" if can_be_image(space) else ""
        if not few and cells > MOST_NUMBERS and self.variant != "grid":
            raise TaskError(
                f"{self.name} observes a grid of {sides(space)} codes, more than {MOST_NUMBERS:,} numbers; "
                f"{self.name}@grid reads all of them, with large networks{shown}"
                + (", where single cells are averaged with their neighbours" if shown else "")
            )
        codes = f", {low} to {high}," if count <= 256 else ""
        how = f"is one-hot, {cells * count} numbers" if few else f"is read as {cells} numbers"
        self.notes.append(f"grid         {label}, {sides(space)} codes{codes} {how}{shown}")
        if not few:
            return cells, plain(space.shape, label)
        return cells * count, one_hot(np.full(space.shape, low), np.full(space.shape, count), label)


# ---------------------------------------------------------------------- parts of an observation


def plain(shape: tuple[int, ...], label: str) -> Write:
    """Numbers as they are."""
    flat = len(shape) == 1

    def write(value: Any, out: np.ndarray) -> None:
        if flat and type(value) is np.ndarray and value.shape == shape and value.dtype.kind in NUMERIC:
            out[:] = value  # the same as below, and what nearly every step of a task is
        else:
            out[:] = numbers(value, shape, label).ravel()

    return write


def one_hot(first: np.ndarray, counts: np.ndarray, label: str) -> Write:
    """Codes first .. first + counts - 1, each array of one shape, one-hot one after the other."""
    shape, low, most = counts.shape, first.ravel().astype(np.int64), counts.ravel().astype(np.int64)
    begins = np.cumsum(most) - most

    def write(value: Any, out: np.ndarray) -> None:
        given = numbers(value, shape, label).ravel()
        codes = given.astype(np.int64) - low
        if ((codes < 0) | (codes >= most) | (codes + low != given)).any():
            bad = int(np.argmax((codes < 0) | (codes >= most) | (codes + low != given)))
            raise BadReturn(
                f"{label} holds {given[bad]}, but its space says whole numbers {low[bad]} to {low[bad] + most[bad] - 1}"
            )
        out[:] = 0.0
        out[begins + codes] = 1.0

    return write


def one_choice(first: int, count: int, label: str) -> Write:
    """One code first .. first + count - 1, one-hot."""

    def write(value: Any, out: np.ndarray) -> None:
        if not isinstance(value, (int, np.integer)):
            array = as_array(value)
            value = array.item() if array is not None and array.size == 1 and array.dtype.kind in NUMERIC else value
        if not isinstance(value, (int, float, np.integer)) or not first <= value < first + count or value % 1:
            raise BadReturn(
                f"{label} is {described(value)}, but its space says a whole number {first} to {first + count - 1}"
            )
        out[:] = 0.0
        out[int(value) - first] = 1.0

    return write


def numbers(value: Any, shape: tuple[int, ...], label: str) -> np.ndarray:
    """The value as an array of numbers; axes of length 1 may be more or fewer than `shape` says."""
    array = as_array(value)
    if array is None or array.dtype.kind not in NUMERIC:
        raise BadReturn(f"{label} is {described(value)}, and numbers of the shape {shape} are needed")
    if array.shape != shape and [n for n in array.shape if n != 1] != [n for n in shape if n != 1]:
        raise BadReturn(
            f"{label} has {array.size} numbers, shape {array.shape}, "
            f"but its space says {math.prod(shape)}, shape {shape}"
        )
    return array


def check_entries(value: Any, named: Mapping[str, Any], label: str) -> None:
    """Raise BadReturn unless `value` is a dictionary with exactly these entries."""
    if not isinstance(value, Mapping):
        raise BadReturn(f"{label} is {described(value)}, and a dictionary with {names_of(named)} is needed")
    if value.keys() != named.keys():
        missing, extra = [key for key in named if key not in value], [key for key in value if key not in named]
        parts = [f"lacks {names_of(missing)}"] * bool(missing) + [f"has {names_of(extra)} besides"] * bool(extra)
        raise BadReturn(f"{label} {' and '.join(parts)}: its space says {names_of(named)}")


def sides(space: spaces.Box) -> str:
    """(6, 7) -> "6 x 7"."""
    return " x ".join(map(str, space.shape))
