"""A run of the world model alone, on a fixed data set."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from agent.data.dataset import check_dataset, load_dataset
from agent.errors import NonFiniteError, UsageError
from agent.execution import make_execution
from agent.runs.config import Config
from agent.runs.folder import claimed
from agent.runs.notes import unused_options
from agent.runs.run import make_agent, open_run
from agent.runtime import keep_memory, seed_everything, set_threads
from agent.training.offline import OfflineTrainer, check_lengths
from world_model import cost


def train_model(config: Config, task: str, slug: str, device: torch.device) -> int:
    """Train the world model alone on a fixed data set, and print its errors on held-out episodes.

    slug: the task's name in folder names. Returns the exit status; raises UsageError.
    """
    if config.train.slice:
        raise UsageError("a run of the world model alone cannot go on after it was stopped: leave --train.slice out")
    dataset = load_dataset(config.dataset or "")
    check_dataset(dataset, task)
    check_lengths(dataset, config.train.length, config.model.jump)
    config = replace(config, optimizer=replace(config.optimizer, workers=1))
    set_threads(config.train.threads)
    keep_memory()
    seed_everything(config.seed)
    agent = make_agent(config, dataset.spaces, device)
    if not (agent.world.observation_model.decodes or agent.world.observation_model.vectors):
        raise UsageError("of images alone, and without a decoder, nothing can be measured: leave --model.objective out")
    name = f"model-{config.model.core.rpartition(':')[2]}-s{config.seed}"
    counts, updates = agent.parameter_counts(), config.offline.updates
    params, flops = cost(agent.world.core, config.model.loop.usual_loops)
    with (
        claimed(config.run_dir, slug, name) as folder,
        open_run(config, task, dataset.spaces, device, counts, folder, updates) as run,
    ):
        batch, execution = (config.train.batch, config.train.length), make_execution(agent)
        trainer = OfflineTrainer(
            config.offline, agent, execution, dataset, run.logger, run.store, batch, config.seed, config.train.sampling,
            config.train.minutes,
        )  # fmt: skip
        run.trainer = trainer
        run.meta.update(core={"params": params, "flops": flops})
        print(f"task         {task}, {updates:,} updates of the world model on {config.dataset}")
        print(f"core         {config.model.core}, {params:,} parameters, {flops:,.0f} operations per step")
        print("\n".join([f"run folder   {folder}", *unused_options(config)]))
        try:
            trainer.run()
        except NonFiniteError as error:
            run.meta.update(not_finite=str(error))
            print(f"error: {error} is not finite at update {trainer.step:,}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"stopped at update {trainer.step:,}; a world model alone does not go on: it will begin anew")
            raise
    run.meta.update(results=trainer.results)
    print("open loop    " + "  ".join(f"{name} {value:.4g}" for name, value in trainer.results.items()))
    return 0
