"""Workers that are processes of this machine, whose weights are one piece of memory."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from miga_engine.errors import DeviceError, MigaError
from miga_engine.handover import SharedEngine
from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.making import Maker, Report
from miga_engine.integrations.batch.store import Store

STOP_SECONDS = 20
"""That a worker is given to end once it has nothing to do."""


@dataclass(frozen=True)
class Task:
    """What a worker is made for: which model, by the options of loading, and where its videos go."""

    loading: dict[str, Any]
    store: Store
    container: str
    save_every: int
    overwrite: bool

    def maker(self, engine: Any) -> Maker:
        return Maker(engine, self.store, self.container, self.save_every, overwrite=self.overwrite)


class Pool(Protocol):
    """Workers by number. One that is lost is replaced under the same number."""

    def idle(self) -> list[int]:
        """Those that wait for a job."""

    def give(self, worker: int, job: Job) -> None:
        """Have it made; its reports come by `wait`."""

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        """What workers have said since; `lost` of one that has died."""

    def stop(self) -> None:
        """Have every worker save what it is at; each then says `stopped`."""

    def close(self) -> None:
        """End the workers."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    is_ready: bool = False
    is_busy: bool = False


class LocalPool:
    """So many processes, each with its share of the processors, or a GPU of its own. DeviceError where none begins.

    engine: what all of them compute with; None: each reads the task's model, on the devices in turn.
    """

    def __init__(self, task: Task, count: int, engine: SharedEngine | None, devices: Sequence[str]) -> None:
        self._task, self._engine, self._devices = task, engine, devices
        self._context = multiprocessing.get_context("spawn")  # a forked child could not use torch's threads
        self._processors = shares(count) if engine is not None and count > 1 else [None] * count
        self._has_begun = self._is_stopping = False
        self._workers = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        device = self._devices[number % len(self._devices)]
        process = self._context.Process(
            target=_work, args=(theirs, self._task, self._engine, device, self._processors[number]),
            name=f"miga-batch-{number}", daemon=True,
        )  # fmt: skip
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def idle(self) -> list[int]:
        return [i for i, worker in enumerate(self._workers) if worker.is_ready and not worker.is_busy]

    def give(self, worker: int, job: Job) -> None:
        self._workers[worker].is_busy = True
        with contextlib.suppress(OSError):  # it has died, which `wait` finds
            self._workers[worker].connection.send(job)

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        numbers: dict[Any, int] = {}
        for i, worker in enumerate(self._workers):
            numbers[worker.connection] = numbers[worker.process.sentinel] = i
        heard = {numbers[thing] for thing in wait(list(numbers), seconds)}
        reports: list[tuple[int, Report]] = []
        for i in sorted(heard):
            worker = self._workers[i]
            is_alive = worker.process.is_alive()  # before the last look
            try:
                while worker.connection.poll():
                    self._take(i, worker.connection.recv(), reports)
            except (EOFError, OSError):
                is_alive = False
                worker.process.join(STOP_SECONDS)
            if not is_alive and not self._is_stopping:
                self._replace(i, reports)
            elif not is_alive and worker.is_busy:
                worker.is_busy = False
                reports.append((i, {"lost": _how_ended(worker.process.exitcode)}))
        return reports

    def _take(self, number: int, said: Report, reports: list[tuple[int, Report]]) -> None:
        worker = self._workers[number]
        if "ready" in said:
            worker.is_ready = self._has_begun = True
        elif "refused" in said:
            raise DeviceError(said["refused"])
        else:
            worker.is_busy = worker.is_busy and "num_frames_out" in said
            reports.append((number, said))

    def _replace(self, number: int, reports: list[tuple[int, Report]]) -> None:
        worker = self._workers[number]
        how = _how_ended(worker.process.exitcode)
        if not self._has_begun:
            raise DeviceError(f"a worker {how} before it had the model: is there the memory? (miga estimate)")
        if worker.is_busy:
            reports.append((number, {"lost": how}))
        worker.connection.close()
        self._workers[number] = self._start(number)

    def stop(self) -> None:
        self._is_stopping = True
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)

    def close(self) -> None:
        self.stop()
        for worker in self._workers:
            worker.process.join(STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()


def _how_ended(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
            return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"


def shares(count: int) -> list[list[int] | None]:
    """The processors that this process may use, dealt out to so many; None each where there are too few, or none is
    told apart."""
    try:
        processors = sorted(os.sched_getaffinity(0))
    except AttributeError:  # another system
        return [None] * count
    if len(processors) < count:
        return [None] * count
    bounds = [len(processors) * i // count for i in range(count + 1)]
    return [processors[start:end] for start, end in itertools.pairwise(bounds)]


def _work(
    connection: Connection, task: Task, shared: SharedEngine | None, device: str, processors: list[int] | None
) -> None:
    """A worker's life: jobs come by the connection, None is to save and end, and reports go back."""
    for name in ("SIGINT", "SIGHUP"):  # of a terminal, which the parent hears too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    import torch

    from miga_engine.engine import Engine

    if processors is not None:
        os.sched_setaffinity(0, processors)
        torch.set_num_threads(len(processors))
    try:
        engine = Engine.from_pretrained(**task.loading, device=device) if shared is None else shared.open()
    except MigaError as error:
        connection.send({"refused": str(error)})
        return
    maker = task.maker(engine)
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    is_stopped = threading.Event()

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (job := connection.recv()) is not None:
                jobs.put(job)
        is_stopped.set()
        jobs.put(None)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to report to
        connection.send({"ready": True})
        while (job := jobs.get()) is not None:
            for report in maker.make(job, is_stopped.is_set):
                connection.send(report)
