"""The agent. Importing it registers the dream of a run as a Gymnasium environment."""

import gymnasium

gymnasium.register("LoopedDreamer/Dream-v0", entry_point="agent.interop.dream_env:DreamEnv")
