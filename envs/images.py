"""Images as observations: one size, RGB or grey, uint8. Which arrays are images, and which are grids of codes."""

from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from envs.errors import TaskError

SIDE = 64
"""Height and width of every image that an agent sees."""

SMALLEST_PICTURE = 32
"""Height and width of the smallest array that is shown as an image: smaller ones are grids of codes."""
LARGEST_CODE = 127
"""Arrays whose numbers go no further are grids of codes: images go to 255."""


def image_space(channels: int = 3) -> spaces.Box:
    """The space of an image."""
    return spaces.Box(0, 255, (SIDE, SIDE, channels), np.uint8)


Kind = Literal["numbers", "grid", "image"]


def kind_of(space: spaces.Space[Any], variant: str = "") -> Kind:
    """How an array is read: its numbers laid end to end, as a grid of codes, or as an image.

    Arrays of three or more axes, and of two where they are uint8, may be images. Of these the integer ones are grids
    of codes where they are smaller than any picture, or where their largest number is far below 255. variant "grid" or
    "image" chooses, whatever they look like.
    """
    if not isinstance(space, spaces.Box) or len(space.shape) < 2 or 0 in space.shape:
        return "numbers"
    whole = space.dtype is not None and space.dtype.kind in "iub"
    if variant == "grid":
        return "grid" if whole else "numbers"
    if len(space.shape) == 2 and space.dtype != np.uint8:
        return "numbers"
    small = sorted(space.shape)[-2] < SMALLEST_PICTURE
    codes = whole and (small or int(space.high.max()) <= LARGEST_CODE)
    return "grid" if codes and variant != "image" else "image"


def can_be_image(space: spaces.Box) -> bool:
    """Whether an array of integers can be shown as an image."""
    colours = len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[-1] in (1, 3))
    return colours and int(space.low.min()) >= 0 and int(space.high.max()) <= 255


def check_image(space: spaces.Box, name: str, variant: str = "") -> int:
    """The channels (1 or 3) of an image space. Raises TaskError for shapes and types that are no image.

    With the variant "image" any type of integers between 0 and 255 will do.
    """
    whole = space.dtype is not None and space.dtype.kind in "iub"
    fits = whole and can_be_image(space) if variant == "image" else space.dtype == np.uint8 and can_be_image(space)
    if not fits:
        other = f"; {name}@grid reads any array number by number" if name.startswith("gym:") else ""
        raise TaskError(
            f"{name} observes images of shape {space.shape} and type {space.dtype}; supported are uint8 images "
            f"(H, W), (H, W, 1) and (H, W, 3), channels last, of 0 to 255{other}"
        )
    return 1 if len(space.shape) == 2 else space.shape[-1]


def resized(image: Any) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> (SIDE, SIDE, 1 or 3), each pixel the mean of the area that it covers."""
    frame = np.asarray(image, np.uint8)
    frame = frame[..., None] if frame.ndim == 2 else frame
    if frame.shape[:2] == (SIDE, SIDE):
        return frame
    import cv2  # comes with the Atari tasks; others need it for such images alone

    return np.asarray(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)).reshape(SIDE, SIDE, -1)
