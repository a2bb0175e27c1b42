"""The presets: values of all options that are not given."""

from __future__ import annotations

from dataclasses import replace

from agent.errors import UsageError
from agent.runs.config import Config
from agent.runtime import cores
from agent.settings import differences, option, to_dict
from agent.training.train_config import TrainConfig

PRESETS = ("debug", "tiny", "small", "pixels", "base")


def preset(name: str) -> Config:
    """The named preset: small is what the dataclasses say, the others differ from it in what stands here."""
    small = Config()
    loop, model, behavior = small.model.loop, small.model, small.behavior
    # Images are seen first, and rewards and dynamics learned then.
    sees = replace(model, image=replace(model.image, anneal=True), reward_scale=2.0)
    if name == "small":
        return small
    if name == "tiny":
        # At most 120,000 parameters on the tasks of @dmc18, a hundredth of DreamerV3-12M, and 43,000 in the core: sizes
        # are chosen by that count. Such small networks wait for the number of steps, not for what a step computes, so
        # sequences are shorter too, and two dreams start from each.
        few = replace(loop, width=56, units=48)
        return replace(
            small,
            preset="tiny",
            model=replace(model, loop=few, groups=12, units=48),
            behavior=replace(behavior, starts=32, units=48),
            train=replace(small.train, length=12),
        )
    if name == "pixels":
        wider = replace(sees, units=256, loop=replace(loop, units=256))  # costs little beside the convolutions
        shared = replace(small.optimizer, workers=min(2, cores()))
        return replace(small, preset="pixels", model=wider, optimizer=shared)
    if name == "base":
        wide = replace(loop, tokens=4, width=64, units=256)
        return replace(
            small,
            preset="base",
            model=replace(
                sees, loop=wide, groups=32, classes=16, units=256, image=replace(sees.image, downsample="stride")
            ),
            behavior=replace(behavior, units=256, starts=0, horizon=15),
            # As many rows and updates per step as DreamerV3's 16 x 64 and 0.25 on Atari-100k. Sequences that are apart
            # teach more, and a GPU waits for the length of a sequence, not for their number.
            train=replace(small.train, batch=64, length=16, ratio=0.25, envs=min(16, cores())),
            optimizer=replace(small.optimizer, lr=4e-4, gpu="compiled"),
        )
    if name == "debug":
        least = replace(loop, tokens=2, width=16, units=32)
        return replace(
            small,
            preset="debug",
            model=replace(model, loop=least, groups=4, classes=4, units=32),
            behavior=replace(behavior, horizon=5, starts=16, units=32),
            train=TrainConfig(
                steps=600,
                prefill=100,
                ratio=0.2,
                batch=4,
                length=8,
                replay_rows=10_000,
                eval_every=300,
                log_every=100,
                save_every=300,
                threads=1,
            ),  # fmt: skip
            eval=replace(small.eval, interim_episodes=2),
        )
    raise UsageError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")


# Random actions before a baseline learns: the library's default of SAC and DQN; PPO's first update comes earlier.
FIRST_ACTIONS = 100


ACTING = (
    "train.envs", "train.prefill", "train.ratio", "train.replay_rows", "train.save_every", "train.on_bad_step",
    "train.lives_end",
)  # fmt: skip
"""What only agents have that learn a world model and act."""


def check_baseline(config: Config) -> None:
    """Raise UsageError where a baseline was given settings that it would not look at."""
    learning = (f"train.{name}" for name in ("batch", "length", "sampling", "slice"))
    if words := given(config, "model.", "behavior.", "optimizer.", "offline.", *learning, *ACTING):
        raise UsageError(f"--agent {config.agent} has its own settings and knows nothing of {words}: leave that out")


def unused(config: Config) -> str:
    """The options that were given, and at which a world model alone, or an agent, does not look; empty for none."""
    if not config.model_only:
        return given(config, "offline.")
    return given(config, "train.steps", "train.eval_every", "train.log_every", "eval.", *ACTING)


def given(config: Config, *names: str) -> str:
    """The options of these names, or that begin with them, that differ from the preset's; empty where none does."""
    changed = differences(to_dict(preset(config.preset)), to_dict(config))
    return ", ".join(option(name) for name in changed if name.startswith(names))
