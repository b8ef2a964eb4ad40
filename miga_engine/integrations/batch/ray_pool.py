"""Workers that are actors of a Ray cluster, whose weights lie in its object store, once on each machine."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from miga_engine._version import __version__
from miga_engine.errors import ConfigError, DeviceError, MigaError
from miga_engine.handover import Packed, unpacked
from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.local import Task
from miga_engine.integrations.batch.making import Report

SAID_AFTER_SECONDS = 60
"""Of a cluster on which no worker begins."""

_log = logging.getLogger("miga_engine")


def require_ray() -> Any:
    """The library; ConfigError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ConfigError("ray is not installed: install miga_engine[ray], or leave --ray out") from None
    return ray


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected; one that was connected before stays so. DeviceError where nobody answers."""
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        words = " ".join(str(error).split())
        raise DeviceError(
            f"no Ray cluster answers at {address!r} ({words[:200]}): start one with `ray start`"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def num_of(ray: Any, resource: str) -> int:
    """GPUs or CPUs that the cluster has."""
    return int(ray.cluster_resources().get(resource, 0))


class Worker:
    """An actor. Jobs are made one at a time; `stop` comes in beside them."""

    def __init__(self, task: Task, weights: Packed | None, version: str, token: str) -> None:
        import torch

        if version != __version__:
            raise DeviceError(
                f"a machine of the cluster has miga_engine {__version__}, and {version} asks: install one"
            )
        if not task.store.marked(token):
            raise DeviceError(
                f"a machine of the cluster does not see {task.store.name}: name a folder that all of them share, or a "
                "URL such as s3://bucket/folder"
            )
        torch.get_num_threads()
        from miga_engine.engine import Engine

        engine = Engine.from_pretrained(**task.loading, device="cuda") if weights is None else unpacked(*weights)
        self._maker = task.maker(engine)
        self._is_stopped = threading.Event()

    def ready(self) -> None:
        """Returns once it has the model."""

    def make(self, job: Job) -> Iterator[Report]:
        """Reports, as they come."""
        yield from self._maker.make(job, self._is_stopped.is_set)

    def stop(self) -> None:
        self._is_stopped.set()


@dataclass
class _Actor:
    handle: Any
    ready: Any
    """A reference that is there once it has the model; None from then on."""
    reports: Any = None
    """Of the job that it makes."""


class RayPool:
    """So many actors, with a GPU each or a CPU; see `local.Pool`.

    weights: what all of them compute with; None: each reads the task's model onto its GPU.
    """

    def __init__(self, ray: Any, task: Task, count: int, weights: Packed | None, *, num_gpus: int) -> None:
        self._ray, self._task = ray, task
        resources = {"num_gpus": num_gpus} if num_gpus else {"num_cpus": 1}
        self._kind = ray.remote(concurrency_groups={"control": 1}, max_restarts=0, **resources)(_with_control(ray))
        token = secrets.token_hex(8)
        task.store.mark(token)
        self._arguments = (task, None if weights is None else ray.put(weights), __version__, token)
        self._has_begun = self._is_stopping = self._has_said = False
        self._begun_at = time.monotonic()
        self._actors = [self._start() for _ in range(count)]

    def _start(self) -> _Actor:
        handle = self._kind.remote(*self._arguments)
        return _Actor(handle, handle.ready.remote())

    def idle(self) -> list[int]:
        return [i for i, actor in enumerate(self._actors) if actor.ready is None and actor.reports is None]

    def give(self, worker: int, job: Job) -> None:
        actor = self._actors[worker]
        actor.reports = actor.handle.make.options(num_returns="streaming").remote(job)

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        numbers = {}
        for i, actor in enumerate(self._actors):
            for reference in (actor.ready, actor.reports):
                if reference is not None:
                    numbers[reference] = i
        if not numbers:
            return []
        if not (self._has_begun or self._has_said) and time.monotonic() - self._begun_at > SAID_AFTER_SECONDS:
            self._has_said = True
            free = {name: left for name, left in self._ray.available_resources().items() if name in ("CPU", "GPU")}
            _log.warning("no worker has begun yet: the cluster has %s free", free or "neither CPUs nor GPUs")
        done, _ = self._ray.wait(list(numbers), num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(list(numbers), num_returns=len(numbers), timeout=0)
        reports: list[tuple[int, Report]] = []
        for reference in done:
            self._hear(numbers[reference], reports)
        return reports

    def _hear(self, number: int, reports: list[tuple[int, Report]]) -> None:
        actor = self._actors[number]
        try:
            if actor.ready is not None:
                self._ray.get(actor.ready)
                actor.ready, self._has_begun = None, True
                return
            said = self._ray.get(next(actor.reports))
            if "num_frames_out" not in said:
                actor.reports = None
            reports.append((number, said))
        except StopIteration:
            actor.reports = None
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            words = " ".join(str(cause or error).split())[:300]
            if actor.ready is not None and (isinstance(cause, MigaError) or not self._has_begun):
                raise DeviceError(words) from None
            if actor.reports is not None:
                reports.append((number, {"lost": f"was lost ({type(error).__name__})"}))
            if not self._is_stopping:
                self._actors[number] = self._start()
            else:
                actor.reports = None

    def stop(self) -> None:
        self._is_stopping = True
        for actor in self._actors:
            actor.handle.stop.remote()

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._task.store.mark(None)


def _with_control(ray: Any) -> type[Worker]:
    """The actor's class, whose `stop` has a thread of its own."""

    class BatchWorker(Worker):
        @ray.method(concurrency_group="control")
        def stop(self) -> None:
            super().stop()

    return BatchWorker
