"""Images as observations: one size, RGB or grey, uint8."""

from typing import Any

import numpy as np
from gymnasium import spaces

from envs.errors import TaskError

SIDE = 64
"""Height and width of every image that an agent sees."""


def image_space(channels: int = 3) -> spaces.Box:
    """The space of an image."""
    return spaces.Box(0, 255, (SIDE, SIDE, channels), np.uint8)


def is_image(space: spaces.Space[Any]) -> bool:
    """Whether a space holds images: a Box of three or more axes, or one of two axes of type uint8."""
    if not isinstance(space, spaces.Box):
        return False
    return len(space.shape) >= 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def check_image(space: spaces.Box, name: str) -> int:
    """The channels (1 or 3) of an image space. Raises TaskError for shapes and types that are no image."""
    channels = 1 if len(space.shape) == 2 else space.shape[-1]
    if space.dtype != np.uint8 or len(space.shape) > 3 or channels not in (1, 3):
        raise TaskError(
            f"{name} observes images of shape {space.shape} and type {space.dtype}; supported are uint8 images "
            "(H, W), (H, W, 1) and (H, W, 3), channels last"
        )
    return channels


def resized(image: Any) -> np.ndarray:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> (SIDE, SIDE, 1 or 3), each pixel the mean of the area that it covers."""
    frame = np.asarray(image, np.uint8)
    frame = frame[..., None] if frame.ndim == 2 else frame
    if frame.shape[:2] == (SIDE, SIDE):
        return frame
    import cv2  # comes with the Atari tasks; others need it for such images alone

    return np.asarray(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)).reshape(SIDE, SIDE, -1)
