"""Atari games of the Arcade Learning Environment, by the two protocols of the field.

    atari100k:pong   100,000 agent steps without sticky actions (Kaiser et al., arXiv 1903.00374)
    atari:pong       sticky actions, with probability 0.25 (Machado et al., arXiv 1709.06009)

Both: 64 x 64 RGB, an action is repeated for 4 frames, the image is the pixel-wise maximum of the last two, up to 30
no-op frames at the start, the game's minimal set of actions, 108,000 frames at most.
"""

import difflib
import importlib.util
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.images import SIDE, image_space

FRAMES = 4
"""Frames of one agent step."""
NOOPS = 30
STICKY = {"atari": 0.25, "atari100k": 0.0}
"""Probability that the last action is repeated, by suite."""


def installed() -> bool:
    """True if the games can be found."""
    return importlib.util.find_spec("ale_py") is not None and importlib.util.find_spec("cv2") is not None


def games() -> dict[str, str]:
    """name ("space_invaders") -> id of the Gymnasium environment ("ALE/SpaceInvaders-v5")."""
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # or every game begins with a banner
    gym.register_envs(ale_py)
    ids = {}
    for name in gym.registry:
        if name.startswith("ALE/"):
            title = name.removeprefix("ALE/").partition("-")[0]
            snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in title).lstrip("_")
            ids[snake] = name
    return ids


def plain(name: str) -> str:
    """A game's name without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def check_game(suite: str, name: str) -> str:
    """The game's name as this package writes it; SpaceInvaders, space-invaders and spaceinvaders mean the same.

    Raises TaskError with the nearest names where there is no such game.
    """
    if not installed():
        raise TaskError(f"{suite} tasks need the games: pip install ale-py==0.12.1 opencv-python-headless==5.0.0.93")
    by_plain = {plain(game): game for game in games()}
    if plain(name) in by_plain:
        return by_plain[plain(name)]
    near = difflib.get_close_matches(plain(name), by_plain, n=3, cutoff=0.5)
    hint = " or ".join(f"{suite}:{by_plain[match]}" for match in near) or f"{suite}:pong"
    raise TaskError(f"there is no Atari game {name!r}; did you mean {hint}?")


class Atari(gym.Wrapper[dict[str, Any], int, Any, int]):
    """One game. Observation: `{"image": (64, 64, 3) uint8}`; actions Discrete; rewards as the game gives them.

    `terminated` when the game is over, `truncated` at the limit of frames. With `lives_end`, the loss of a life
    terminates too, and the next reset continues the game; an episode's return is then that of one life, so that this
    is for training alone.

    Args:
        suite: "atari" or "atari100k".
        game: a name from `games`.
        render_mode: None or "rgb_array", frames of 210 x 160.
        lives_end: whether the loss of a life ends the episode.
    """

    def __init__(self, suite: str, game: str, render_mode: str | None = None, lives_end: bool = False) -> None:
        from gymnasium.wrappers import AtariPreprocessing

        inner = gym.make(
            games()[game],
            frameskip=1,
            repeat_action_probability=STICKY[suite],
            full_action_space=False,
            render_mode=render_mode,
        )
        screen = AtariPreprocessing(inner, NOOPS, FRAMES, SIDE, terminal_on_life_loss=False, grayscale_obs=False)
        super().__init__(screen)  # type: ignore[arg-type]
        self.observation_space = spaces.Dict({"image": image_space()})
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // FRAMES}
        self.lives_end, self.lives, self.over = lives_end, 0, True
        self.reset_reward = 0.0  # of the step that a reset after a lost life takes; the next step returns it

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start a game, or, where only a life was lost, continue it with one no-op step."""
        if self.over or not self.lives_end or seed is not None:
            image, info = self.env.reset(seed=seed, options=options)
        else:
            image, self.reset_reward, terminated, truncated, info = self.env.step(0)  # type: ignore[assignment]
            if terminated or truncated:
                image, info = self.env.reset(options=options)
                self.reset_reward = 0.0  # it belongs to a game that is over
        self.over, self.lives = False, int(info.get("lives", 0))
        return {"image": np.asarray(image)}, info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Repeat the action for four frames."""
        image, reward, terminated, truncated, info = self.env.step(int(action))
        reward, self.reset_reward = float(reward) + float(self.reset_reward), 0.0
        self.over = bool(terminated or truncated)
        before, self.lives = self.lives, int(info.get("lives", 0))
        lost = self.lives_end and self.lives < before
        return {"image": np.asarray(image)}, float(reward), bool(terminated or lost), bool(truncated), info
