"""The agent. From Python:

    from agent import Dreamer
    agent = Dreamer.load("runs/dmc-cartpole_swingup/small-s0-20261123-1456")
    action, state = agent.predict(observation, deterministic=True)

Importing this package registers the Gymnasium environment "LoopedDreamer/Dream-v0", the dream of a run. PyTorch is
imported when `Dreamer` is first used, so that the registration alone takes no time.
"""

from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from agent.learning.dreamer import Dreamer

__all__ = ["Dreamer"]

gymnasium.register("LoopedDreamer/Dream-v0", entry_point="agent.interop.dream_env:DreamEnv")


def __getattr__(name: str) -> Any:
    """Import `Dreamer` on first use (PEP 562)."""
    if name == "Dreamer":
        from agent.learning.dreamer import Dreamer

        return Dreamer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
