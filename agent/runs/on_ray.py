"""Runs of a sweep on the nodes of a Ray cluster (the optional package ray).

Every run is an actor, which Ray places where there is room for it and which starts the run's command there. A run whose
node is lost starts again on another one, from its last checkpoint. Every node needs this project, installed in the
environment of its `ray start`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from agent.errors import UsageError
from agent.runs.node_run import NodeRun, Said, pack, source_fingerprint, unpack
from agent.runs.sweep_grid import LOST, SweepRun

COPY_SECONDS = 120.0
"""Time between two copies of a run whose folder is not shared."""


@contextmanager
def on_ray(lock: TextIO, cpus: float, gpus: float) -> Iterator[RayCluster]:
    """The cluster that this machine belongs to. lock: the open TOKEN of the sweep's folder. Raises UsageError."""
    try:
        import ray
    except ImportError:
        raise UsageError("--on ray needs the package ray: pip install -e '.[cluster]'") from None
    begun = not ray.is_initialized()
    if begun:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            raise UsageError(
                "no Ray cluster is running on this machine: ray start --head, and on further machines "
                "ray start --address=HOST:6379; or leave --on ray out"
            ) from None
    try:
        yield RayCluster(ray, lock, cpus, gpus)
    finally:
        if begun:
            ray.shutdown()


class RayCluster:
    """The place of runs that take so many CPUs and GPUs of a node. Raises UsageError where no node has them."""

    def __init__(self, ray: Any, lock: TextIO, cpus: float, gpus: float):
        self.ray, self.token = ray, uuid.uuid4().hex
        lock.seek(0)
        lock.truncate()
        lock.write(self.token)
        lock.flush()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            most = max(node.get("CPU", 0) for node in nodes), max(node.get("GPU", 0) for node in nodes)
            raise UsageError(
                f"no node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs (at most {most[0]:g} and {most[1]:g}): "
                "give less with --cpus and --gpus"
            )
        self.kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(NodeRun)
        self.source = source_fingerprint()

    def start(self, run: SweepRun, arguments: Sequence[str]) -> RayRun:
        content = pack(run.folder) if "--resume" in arguments else None
        words = run.elsewhere(arguments)
        actor = self.kind.remote()
        started = actor.begin.remote(str(run.folder.absolute()), words, self.token, self.source, content)
        return RayRun(self.ray, run, actor, started)


class RayRun:
    """A `RunProcess` on a node. Nothing here waits for the node, but for the last copy of a folder."""

    def __init__(self, ray: Any, run: SweepRun, actor: Any, started: Any):
        self.ray, self.run, self.actor, self.started = ray, run, actor, started
        self.answer: Any = None
        self.copy: Any = None
        self.last = Said(None, "waits for a node", 0.0)
        self.begun = self.interrupted = False
        self.copied, self.copied_at = 0.0, time.monotonic()

    def poll(self) -> int | None:
        try:
            if not self.begun:
                return self.begin()
            if self.ready(self.answer):
                self.last = self.ray.get(self.answer)
                self.answer = self.actor.ask.remote()
            if self.last.status is not None:
                return self.end(self.last.status)
            self.copy_back()
        except self.ray.exceptions.RayActorError as error:
            self.last = self.last._replace(line=str(error).strip().splitlines()[-1])
            return LOST
        except (self.ray.exceptions.RayTaskError, OSError) as error:  # no room on its node, or for its copy here
            return self.refuse(error)
        return None

    def begin(self) -> int | None:
        """See whether the run has begun; an exit status where it cannot."""
        if self.interrupted:  # before there was room for it
            return self.end(130)
        if self.ready(self.started):
            try:
                self.ray.get(self.started)
            except UsageError as error:
                return self.refuse(error)
            self.begun, self.answer = True, self.actor.ask.remote()
        return None

    def refuse(self, error: Exception) -> int:
        """End a run that its node could not begin or go on with: it has failed, the others go on."""
        reason = str(error).strip().splitlines()[-1]
        self.last = self.last._replace(line=reason)
        with suppress(OSError), self.run.log.open("a", encoding="utf-8") as log:
            log.write(reason + "\n")
        self.ray.kill(self.actor)
        return 2

    def ready(self, answer: Any) -> bool:
        return bool(self.ray.wait([answer], timeout=0)[0])

    def copy_back(self) -> None:
        """Copy the folder of a run that nobody else sees, when it has saved and some time has passed."""
        if self.copy is not None and self.ready(self.copy):
            content, self.copy = self.ray.get(self.copy), None
            if content is not None:
                unpack(content, self.run.folder)
        due = self.last.saved > self.copied and time.monotonic() - self.copied_at > COPY_SECONDS
        if self.copy is None and due:
            self.copy, self.copied, self.copied_at = self.actor.packed.remote(), self.last.saved, time.monotonic()

    def end(self, status: int) -> int:
        """Copy what there is, and give the node's place to another run."""
        if self.begun:
            content = self.ray.get(self.actor.packed.remote())
            if content is not None:
                unpack(content, self.run.folder)
            self.ray.get(self.actor.forget.remote())
        self.ray.kill(self.actor)
        return status

    def send_signal(self, number: int) -> None:
        self.interrupted = True
        if self.begun:
            self.actor.interrupt.remote()

    def said(self) -> str:
        return self.last.line
