"""An environment that is odd in the ways that the variable ODD names: gym:tests.faults.oddities:Odd-v0.

ODD is JSON: {part: name of an entry of that part's table below}. What is not named is as it should be.
"""

import json
import os
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import gymnasium as gym
import numpy as np
from gymnasium import spaces

BYTES = np.uint8
OBSERVATIONS = {
    "as it should be": spaces.Box(-1.0, 1.0, (3,)),
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "integers": spaces.Box(-5, 5, (4,), np.int64),
    "a number": spaces.Box(-1.0, 1.0, ()),
    "a matrix": spaces.Box(-1.0, 1.0, (3, 4)),
    "nothing": spaces.Box(-1.0, 1.0, (0,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (3,)),
    "booleans": spaces.Box(0, 1, (4,), np.bool_),
    "discrete": spaces.Discrete(5),
    "discrete from 3": spaces.Discrete(5, start=3),
    "discrete, far too many": spaces.Discrete(10**9),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"a": spaces.Box(-1.0, 1.0, (2,)), "b": spaces.Discrete(3)}),
    "empty dict": spaces.Dict({}),
    "nested dict": spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1.0, 1.0, (2,))})}),
    "dict of text": spaces.Dict({"a": spaces.Text(5), "b": spaces.Box(-1.0, 1.0, (2,))}),
    "names with dots": spaces.Dict({"a.b": spaces.Box(0, 255, (64, 64, 3), BYTES), "é": spaces.Box(-1.0, 1.0, (2,))}),
    "an image called state": spaces.Dict({"state": spaces.Box(0, 255, (64, 64, 3), BYTES)}),
    "tuple": spaces.Tuple((spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(3))),
    "tuple with an image": spaces.Tuple((spaces.Box(0, 255, (64, 64, 3), BYTES), spaces.Discrete(3))),
    "text": spaces.Text(5),
    "sequence": spaces.Sequence(spaces.Discrete(3)),
    "image": spaces.Box(0, 255, (64, 64, 3), BYTES),
    "grey image": spaces.Box(0, 255, (64, 64), BYTES),
    "wide image": spaces.Box(0, 255, (40, 90, 3), BYTES),
    "image, channels first": spaces.Box(0, 255, (3, 64, 64), BYTES),
    "image of four channels": spaces.Box(0, 255, (64, 64, 4), BYTES),
    "stack of images": spaces.Box(0, 255, (4, 64, 64, 3), BYTES),
    "image of floats": spaces.Box(0.0, 1.0, (64, 64, 3)),
    "tiny image": spaces.Box(0, 255, (1, 1, 3), BYTES),
    "grid of codes": spaces.Box(0, 10, (7, 7, 3), BYTES),
    "board": spaces.Box(0, 2, (6, 7), BYTES),
    "none": None,
    "a shape": (3,),
}
ACTIONS = {
    "as it should be": spaces.Discrete(2),
    "one choice": spaces.Discrete(1),
    "from 5": spaces.Discrete(3, start=5),
    "negative": spaces.Discrete(3, start=-1),
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "half bounded": spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([np.inf, 1.0], np.float32)),
    "matrix": spaces.Box(-2.0, 3.0, (2, 2)),
    "no width": spaces.Box(1.0, 1.0, (2,)),
    "a number": spaces.Box(-1.0, 1.0, ()),
    "empty": spaces.Box(-1.0, 1.0, (0,)),
    "integers": spaces.Box(-3, 3, (2,), np.int32),
    "float64": spaces.Box(-1e300, 1e300, (1,), np.float64),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))),
    "text": spaces.Text(4),
    "none": None,
}
REWARDS = {
    "as it should be": 1.0, "integer": 3, "boolean": True, "float32": np.float32(0.5), "float16": np.float16(0.5),
    "array of none": np.zeros(0), "array of one": np.array([1.0]), "array without axes": np.array(1.0),
    "array of two": np.array([1.0, 2.0]), "list": [1.0], "none": None, "text": "1.0", "nan": float("nan"),
    "infinite": float("inf"), "beyond float32": 1e39, "beyond float64": 10**400, "complex": 1 + 0j,
    "fraction": Fraction(1, 3), "decimal": Decimal("0.1"), "tiny": 1e-6, "huge": 1e12, "object": object(),
    "dict": {"reward": 1.0}, "masked": np.ma.masked,
}  # fmt: skip
ENDS = {
    "as it should be": None, "numpy": np.True_, "integer": 1, "none": None.__class__, "array of one": np.array([True]),
    "array of two": np.array([True, False]), "text": "yes", "nan": float("nan"), "never": False, "at once": True,
}  # fmt: skip
INFOS = {
    "as it should be": dict, "none": lambda: None, "list": lambda: [1, 2], "text": lambda: "info",
    "numbers as names": lambda: {1: 2, (3, 4): 5}, "other shapes": lambda: {"x": np.zeros(np.random.randint(1, 5))},  # noqa: NPY002
    "other types": lambda: {"x": [1, "a", None, 2.5][np.random.randint(4)]},  # noqa: NPY002
    "contacts": lambda: {"contacts": "hello"}, "episode": lambda: {"episode": 3}, "lives": lambda: {"lives": "many"},
    "final_obs": lambda: {"final_obs": 1, "final_info": 2, "_final_obs": 3}, "functions": lambda: {"f": len},
    "nested": lambda: {"a": {"b": {"c": np.ones(2)}}}, "large": lambda: {"x": np.zeros(100_000)},
    "not a number": lambda: {"x": float("nan")}, "itself": lambda: {"x": sys},
}  # fmt: skip
RETURNS = ("as it should be", "old", "too many", "too few", "none", "a list", "a generator", "raises", "exits",
           "interrupts", "recursion", "memory", "warns", "prints", "raises without words", "raises with lines",
           "wrong shape", "wrong type", "nan", "infinite", "beyond float32", "texts", "missing",
           "too large")  # fmt: skip
"""What reset and step do: return another number of things, raise, or observations of other kinds."""
CLOSES = ("as it should be", "raises", "exits", "absent")
MAKES = ("as it should be", "raises", "raises from the second on", "exits", "no reset", "no spec")
TABLES = {"observation": OBSERVATIONS, "action": ACTIONS, "reward": REWARDS, "end": ENDS, "info": INFOS,
          "reset": RETURNS, "step": RETURNS, "close": CLOSES, "make": MAKES}  # fmt: skip
FINE = "as it should be"


class OddWorld(Exception):
    """Raised on purpose."""


class Odd(gym.Env):
    """See above."""

    made = 0

    def __init__(self):
        odd = json.loads(os.environ.get("ODD", "{}"))
        self.odd = {part: odd.get(part, FINE) for part in TABLES}
        self.observation_space, self.action_space = OBSERVATIONS[self.odd["observation"]], ACTIONS[self.odd["action"]]
        Odd.made += 1
        if self.odd["make"] == "raises" or (self.odd["make"] == "raises from the second on" and Odd.made > 1):
            raise OddWorld("the robot is not connected")
        if self.odd["make"] == "exits":
            sys.exit("no licence was found")
        self.time = 0

    def look(self, how):
        value = self.observation_space.sample() if isinstance(self.observation_space, spaces.Space) else np.zeros(3)
        if how == "wrong shape":
            return np.zeros(7, np.float32)
        if how == "wrong type":
            return {"surprise": value}
        if how == "missing" and isinstance(value, dict):
            return {}
        if how in ("nan", "infinite", "beyond float32", "too large"):
            fill = {"nan": np.nan, "infinite": np.inf, "beyond float32": 1e39, "too large": 1e6}[how]
            return np.full(np.shape(value), fill) if isinstance(value, np.ndarray) else fill
        return ["a", "b"] if how == "texts" else value

    def act_odd(self, how):
        """Whatever is odd before anything is returned."""
        if how == "raises":
            raise OddWorld("the simulator has diverged")
        if how == "raises without words":
            raise OddWorld
        if how == "raises with lines":
            raise OddWorld("first line\nsecond line\n\nlast line")
        if how == "exits":
            sys.exit(3)
        if how == "interrupts":
            raise KeyboardInterrupt
        if how == "recursion":
            self.act_odd(how)
        if how == "memory":
            raise MemoryError
        if how == "warns":
            warnings.warn("this is odd", stacklevel=2)
        if how == "prints":
            print("hello from the environment")

    def returned(self, how, values, fewer):
        """The values of reset or step, in the number and kind that is asked for."""
        if how == "old":
            return fewer
        if how == "none":
            return None
        if how == "a list":
            return list(values)
        if how == "a generator":
            return (value for value in values)
        return {"too many": (*values, 0), "too few": values[:1]}.get(how, values)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        how = self.odd["reset"]
        self.act_odd(how)
        obs = self.look(how)
        return self.returned(how, (obs, INFOS[self.odd["info"]]()), obs)

    def step(self, action):
        self.time += 1
        how = self.odd["step"] if self.time > 5 else FINE  # in the middle of an episode
        self.act_odd(how)
        over = self.time >= 12 if self.odd["end"] in (FINE, "numpy") else ENDS[self.odd["end"]]
        values = self.look(how), REWARDS[self.odd["reward"]], over, False, INFOS[self.odd["info"]]()
        return self.returned(how, values, (*values[:3], values[4]))

    def close(self):
        if self.odd["close"] == "raises":
            raise OddWorld("the window was never opened")
        if self.odd["close"] == "exits":
            sys.exit(4)


def make():
    """The environment, or something that is none."""
    odd = json.loads(os.environ.get("ODD", "{}")).get("make", FINE)
    return object() if odd == "no reset" else Odd()


gym.register("Odd-v0", entry_point=make, max_episode_steps=60)


def draw(rng):
    """{part: name}: one to three oddities."""
    count = rng.choice((1, 1, 1, 1, 2, 2, 3))
    return {part: rng.choice(list(TABLES[part])) for part in rng.sample(list(TABLES), count)}
