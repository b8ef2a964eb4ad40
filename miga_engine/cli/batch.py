"""`miga batch`."""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine.cli.settings import read_settings, video_options
from miga_engine.cli.terminal import Screen, say
from miga_engine.config import LoadOptions, MigaConfig, StreamOptions
from miga_engine.errors import ConfigError, DeviceError, MigaError
from miga_engine.integrations.batch.settings import BatchOptions
from miga_engine.options import picked
from miga_engine.request import Request

if TYPE_CHECKING:
    from miga_engine.integrations.batch.jobs import Job
    from miga_engine.integrations.batch.local import Pool, Task
    from miga_engine.integrations.batch.running import Outcome
    from miga_engine.integrations.batch.store import Store

RECORDS = (LoadOptions, Request, MigaConfig, StreamOptions, BatchOptions)
"""Whose options `miga batch` takes."""

_CARDS = (24, 48, 80)
"""GiB of memory of the GPUs for which a dry run says how many videos they hold."""
_SAMPLE_SEED = 0


def batch(options: argparse.Namespace) -> int:
    """The command: read the jobs, check each, have them made."""
    settings = read_settings(options, RECORDS)
    asked = BatchOptions(**picked(settings, BatchOptions))
    from miga_engine.integrations.batch.jobs import FILES, read_jobs
    from miga_engine.integrations.batch.manifest import Manifest
    from miga_engine.integrations.batch.store import store_of

    common = {**video_options(settings), **picked(settings, StreamOptions)}
    common |= common.pop("miga")
    common |= {name: str(Path(common[name]).absolute()) for name in FILES if name in common}
    path = settings["jobs"]
    made = {} if asked.verify is None else Manifest.made_in(path)
    jobs = read_jobs(path, common, asked.seed_numbers(), asked.segments)
    _check(jobs, settings)
    if asked.dry_run:
        return _dry_run(jobs, settings)
    if asked.verify is not None:
        return _verify(jobs, made, settings, asked)
    store = store_of(asked.output)
    with store.held():
        return _make(jobs, store, settings, asked)


def _check(jobs: Sequence[Job], settings: Mapping[str, Any]) -> None:
    """ConfigError that names the first job that cannot be made."""
    from miga_engine.engine import Engine

    loading = {**picked(settings, LoadOptions), "device": "meta", "attention": "auto", "compile": False}
    shapes = Engine.from_pretrained(**loading)
    for job in [part for whole in jobs for part in whole.parts()]:
        try:
            shapes.resolve(job.prompt, **job.of_video())
            StreamOptions(**job.of_stream())
        except MigaError as error:
            raise ConfigError(f"{job.place}: {error}") from None


def _make(jobs: Sequence[Job], store: Store, settings: Mapping[str, Any], asked: BatchOptions) -> int:
    from miga_engine.integrations.batch.making import remove_sessions, video_of
    from miga_engine.integrations.batch.manifest import Manifest
    from miga_engine.integrations.batch.segments import Segments

    manifest, files = Manifest(store), store.names()
    everything = list({part.name: part for job in jobs for part in (job, *job.parts())}.values())
    if asked.overwrite:
        manifest.forget(job.name for job in everything)
    left = [job for job in jobs if not manifest.is_made(job, files)]
    parts = {part.name: part for job in left for part in job.parts()}
    there = {name: manifest.made[name] for name, part in parts.items() if manifest.is_made(part, files)}
    manifest.forget(job.name for job in everything if job.name in parts and job.name not in there)  # the video is gone
    if len(left) < len(jobs):
        say(f"miga: {len(jobs) - len(left)} of {len(jobs)} videos are there already")
    num_made = num_frames = 0

    def on_whole(job: Job, made: dict[str, Any], parts: list[Job]) -> None:
        nonlocal num_made, num_frames
        num_made, num_frames = num_made + 1, num_frames + made["num_frames"]
        if parts:
            manifest.add(job, made)
            manifest.forget(part.name for part in parts)
            for part in parts:
                store.remove(video_of(part, asked.container))

    segments = Segments(left, there, store, asked.container, on_whole)

    def on_made(part: Job, made: dict[str, Any]) -> None:
        manifest.add(part, made)
        remove_sessions(store, part)
        segments.add(part, manifest.made[part.name])

    started = time.perf_counter()
    outcome, signals = _run(segments.left, store, settings, asked, on_made)
    seconds = time.perf_counter() - started
    manifest.put_in_order(everything)
    lost = f"; {outcome.num_lost} times a worker was lost" if outcome.num_lost else ""
    say(f"{store.name}: {num_made} videos, {num_frames} frames; {seconds:.1f} s "
        f"({num_frames / max(seconds, 1e-3):.1f} frames/s){lost}")  # fmt: skip
    return _report(outcome, signals, {job.name: job for job in everything})


def _report(outcome: Outcome, signals: list[int], jobs: Mapping[str, Job]) -> int:
    """Say what failed, a line each; the exit code."""
    width = max(map(len, outcome.failed), default=0)
    for name, sentence in outcome.failed.items():
        say(f"miga: failed: {name:<{width}}  {jobs[name].place}: {sentence}")
    if signals:
        say("miga: interrupted; the same command goes on")
        return 128 + signals[0]
    if outcome.failed:
        say(f"miga: {len(outcome.failed)} of {len(jobs)} videos failed; the same command goes on with them")
        return 2
    return 0


def _run(
    jobs: Sequence[Job], store: Store, settings: Mapping[str, Any], asked: BatchOptions, on_made: Any
) -> tuple[Outcome, list[int]]:
    """Have jobs made into a store; what came of them, and the signals that stopped it."""
    from tqdm import tqdm

    from miga_engine.cli.render import interruptible
    from miga_engine.integrations.batch.local import Task
    from miga_engine.integrations.batch.running import Outcome, run

    if not jobs:
        return Outcome(), []
    loading = {name: value for name, value in picked(settings, LoadOptions).items() if name != "device"}
    task = Task(loading, store, asked.container, asked.save_every, asked.overwrite)
    num_made = 0
    with interruptible() as signals, _pool(task, len(jobs), settings, asked) as pool:
        total = sum(job.num_frames for job in jobs)
        bar: Any = tqdm(total=total, unit="frame", disable=True if asked.quiet else None, file=Screen())

        def is_made(job: Job, made: dict[str, Any]) -> None:
            nonlocal num_made
            on_made(job, made)
            num_made += 1
            bar.set_postfix_str(f"{num_made} of {len(jobs)} videos", refresh=False)

        def is_at(num_frames: int) -> None:
            bar.n = num_frames
            bar.refresh()

        with bar:
            bar.set_postfix_str(f"0 of {len(jobs)} videos")
            outcome = run(jobs, pool, asked.retries, lambda: bool(signals), is_made, is_at)
        return outcome, list(signals)


@contextlib.contextmanager
def _pool(task: Task, num_jobs: int, settings: Mapping[str, Any], asked: BatchOptions) -> Iterator[Pool]:
    """Workers of this machine, or of a cluster; no more than there are jobs."""
    import torch

    from miga_engine.device import resolve_device
    from miga_engine.engine import Engine
    from miga_engine.handover import SharedEngine, packed
    from miga_engine.integrations.batch.local import LocalPool

    device = settings.get("device")
    is_for_gpus = device is not None and device != "cpu"
    if asked.ray is not None:
        from miga_engine.integrations.batch.ray_pool import RayPool, cluster, num_of

        with cluster(asked.ray) as ray:
            num_gpus = 0 if device == "cpu" else num_of(ray, "GPU")
            if is_for_gpus and not num_gpus:
                raise DeviceError(f"the cluster at {asked.ray!r} has no GPU for device {device!r}: leave --device out")
            weights = None if num_gpus else packed(Engine.from_pretrained(**task.loading, device="cpu"))
            count = min(num_jobs, asked.workers or num_gpus or max(1, num_of(ray, "CPU")))
            pool = RayPool(ray, task, count, weights, num_gpus=min(num_gpus, 1))
            del weights
            with contextlib.closing(pool):
                yield pool
        return
    if is_for_gpus:
        resolve_device(device)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count() if device in (None, "cuda") else 0)]
    devices = gpus or [device or "cpu"]
    on_cpu = devices == ["cpu"]
    count = min(num_jobs, asked.workers or len(devices))
    with contextlib.ExitStack() as stack:
        engine = SharedEngine(Engine.from_pretrained(**task.loading, device="cpu")) if on_cpu else None
        if engine is not None:
            stack.callback(engine.close)
        yield stack.enter_context(contextlib.closing(LocalPool(task, count, engine, devices)))


def _verify(
    jobs: Sequence[Job], made: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], asked: BatchOptions
) -> int:
    """Make some of a manifest's videos again, and compare."""
    from miga_engine.integrations.batch.segments import Segments
    from miga_engine.integrations.batch.store import store_of

    assert asked.verify is not None
    known = [job for job in jobs if job.name in made]
    sample = random.Random(_SAMPLE_SEED).sample(known, min(asked.verify, len(known)))
    differ: list[str] = []
    num_compared = 0

    def compare(job: Job, again: dict[str, Any]) -> None:
        then = made[job.name]
        nonlocal num_compared
        num_compared += 1
        is_same = then["frames"] == again["frames"]
        if not is_same:
            differ.append(job.name)
        apart = [
            f"{name} {then.get(name)} there, {again[name]} here"
            for name in ("transformer", "VAE", "dtype", "device", "torch", "miga_engine", "host")
            if then.get(name) != again[name]
        ]
        say(f"{job.name}: {'the same' if is_same else 'OTHER'} {again['num_frames']} frames"
            + (f" ({'; '.join(apart)})" if apart else ""))  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="miga-verify-") as folder:
        store = store_of(folder)
        segments = Segments(sample, {}, store, asked.container, lambda job, again, parts: compare(job, again))
        outcome, signals = _run(segments.left, store, settings, asked, segments.add)
    code = _report(outcome, signals, {part.name: part for part in (*sample, *segments.left)})
    if differ:
        say(f"miga: {len(differ)} of {num_compared} videos have other frames than the manifest says")
    return code or (2 if differ else 0)


def _dry_run(jobs: Sequence[Job], settings: Mapping[str, Any]) -> int:
    """Print the jobs, and what each would need of memory."""
    from miga_engine.device import amount
    from miga_engine.engine import Engine

    loading, needs, lines = picked(settings, LoadOptions), dict[str, Any](), []
    for job in jobs:
        options = {name: value for name, value in job.of_video().items() if name != "seed"}
        kinds = sorted((name, repr(value)) for name, value in options.items() if name != "num_frames")
        key = f"{len(job.prompt)} {kinds}"
        if key not in needs:
            needs[key] = [Engine.estimate(**{**loading, "device": device}, prompt=job.prompt, **options)
                          for device in ("cpu", "cuda")]  # fmt: skip
        on_cpu, on_gpu = needs[key]
        lines.append((job.name, f"{job.num_frames}", amount(on_cpu.host_total), amount(on_gpu.device_total)))
    head = ("video", "frames", "on a CPU", "on a GPU")
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        print(
            "  ".join(
                [line[0].ljust(widths[0])] + [text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)]
            )
        )
    most = max(on_gpu.device_total for _, on_gpu in needs.values())
    cards = ", ".join(f"{(card << 30) // most} of {card} GiB" for card in _CARDS)
    total = sum(job.num_frames for job in jobs)
    print(f"\n{len(jobs)} videos, {total} frames. At once, of the largest, on a GPU: {cards}.")
    return 0
