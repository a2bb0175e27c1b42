"""Environments of the faults, as a person's own module registers them: gym:tests.faults.worlds:Told-v0."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Told(gym.Env):
    """The picture is one grey of 0 to 250 and the reward is that grey, so it can be seen whether both still belong
    together. Episodes last 15 to 30 steps."""

    observation_space = spaces.Box(0, 255, (64, 64, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def look(self):
        self.grey = int(self.np_random.integers(0, 251))
        return np.full((64, 64, 1), self.grey, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(15, 31))
        return self.look(), {}

    def step(self, action):
        self.left -= 1
        return self.look(), float(self.grey), self.left == 0, False, {}


class Beat(gym.Env):
    """Ten steps an episode and no chance: the reward is 1 - |action - beat| where the beat alternates."""

    observation_space = spaces.Box(-1.0, 1.0, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def look(self):
        return np.array([(-1.0) ** self.time, self.last], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.last = 0, 0.0
        return self.look(), {}

    def step(self, action):
        self.last = float(action[0])
        reward = 1.0 - abs(self.last - 0.5 * (-1.0) ** self.time)
        self.time += 1
        return self.look(), reward, False, self.time == 10, {}


for kind in (Told, Beat):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=1000)
