"""The pass engine: batches, running out of memory, several ranks, and how little Python a pass takes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import PlainNetwork, counter_noise, pseudo_network

from miga_engine.config import MigaConfig
from miga_engine.errors import DeviceError, SessionError
from miga_engine.runtime.denoise import Denoiser, Window, _split
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

SHAPE = (4, 2, 3)
CPU = torch.device("cpu")
CONFIG = MigaConfig(
    zigzag_width=3, stage2_steps=4, refine_steps=3, guidance_frames=2, judge_step=5, score_drop=-2.0, judge="x0"
)  # a search after every judgement


def video(num_frames: int = 31, *, window_batch: int = 1, network=pseudo_network, **options) -> torch.Tensor:
    config = CONFIG if window_batch == 1 else MigaConfig(**{**CONFIG.__dict__, "window_batch": window_batch})
    run = VideoRun(
        PlainNetwork(network), make_schedule("unipc", 16, 5.0), config, window_frames=9, frame_shape=SHAPE,
        noise=counter_noise(5, SHAPE), num_frames=num_frames, guidance_scale=5.0, device=CPU, **options,
    )  # fmt: skip
    return torch.cat([clean.latents for clean in run])


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_batches_hold_equal_windows_in_order(limit: int) -> None:
    lengths = [9, 9, 9, 4, 9, 9, 4, 4, 4]
    windows = [Window(np.arange(n), 0, 1) for n in lengths]
    batches = _split(windows, limit)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(len({lengths[i] for i in batch}) == 1 and 1 <= len(batch) <= limit for batch in batches)
    experts = [0, 0, 0, 0, 1, 1, 1, 1, 0]
    batches = _split(windows, limit, experts)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(len({(lengths[i], experts[i]) for i in batch}) == 1 for batch in batches)
    assert _split([], limit) == []


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_once_and_loses_nothing() -> None:
    sizes, events = [], []

    def small_memory(latents, timesteps, rows):
        sizes.append(latents.shape[0] // 2)  # two guidance branches
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return pseudo_network(latents, timesteps, rows)

    def emit(kind, **data):
        events.append(data) if kind == "window_batch" else None

    limited = video(window_batch=4, network=small_memory, emit=emit)
    assert events == [{"window_batch": 2, "reason": "out of memory"}]
    assert sum(size > 2 for size in sizes) == 1
    torch.testing.assert_close(limited, video(window_batch=4), atol=1e-5, rtol=1e-5)


def test_a_single_window_that_does_not_fit_is_an_error() -> None:
    def no_memory(latents, timesteps, rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(DeviceError, match=r"out of memory on cpu in the network, with one window of \d+ latent frames"):
        video(network=no_memory)


def test_other_errors_are_not_taken_for_it() -> None:
    def broken(latents, timesteps, rows):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        video(window_batch=4, network=broken)


class _ThreePrompts:
    num_prompts = 3

    def place_prompts(self, prompt_rows):
        return prompt_rows

    def __call__(self, batch):
        raise AssertionError("the network ran")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("slot 9", lambda store, slots: slots.__setitem__(2, 9)),
        ("slot -1", lambda store, slots: slots.__setitem__(2, -1)),
        ("step -3", lambda store, slots: store.step_index.__setitem__(1, -3)),
        ("prompt row 3", lambda store, slots: store.prompt_row.__setitem__(1, 3)),
    ],
)
def test_a_pass_checks_its_tables_before_the_network_runs(name: str, damage) -> None:
    """Once, on the host: on a GPU nobody else would look at them without waiting."""
    store, slots = FrameStore(9, SHAPE, CPU), np.arange(9)
    damage(store, slots)
    schedule = make_schedule("unipc", 16, 5.0)
    denoiser = Denoiser(_ThreePrompts(), store, schedule, counter_noise(0, SHAPE), guidance_scale=5.0)
    with pytest.raises(SessionError, match=f"the run names {name} where there are"):
        denoiser.run([Window(slots, 1, 8)])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("step 16", lambda store: store.step_index.__setitem__(4, 16)),
        ("history length 3", lambda store: store.history_length.__setitem__(4, 3)),
        ("history length -1", lambda store: store.history_length.__setitem__(4, -1)),
    ],
)
def test_an_update_checks_its_tables(name: str, damage) -> None:
    store = FrameStore(9, SHAPE, CPU)
    damage(store)
    schedule = make_schedule("unipc", 16, 5.0)
    denoiser = Denoiser(PlainNetwork(pseudo_network), store, schedule, counter_noise(0, SHAPE), guidance_scale=5.0)
    with pytest.raises(SessionError, match=f"the run names {name} where there are"):
        denoiser.run([Window(np.arange(9), 1, 8)])


@pytest.mark.parametrize("num_windows", [1, 3])
def test_python_work_of_a_pass_does_not_grow_with_its_frames(num_windows: int) -> None:
    """Calls of Python functions and of built-in ones, counted: no per-frame Python."""

    def count(frames: int) -> int:
        store = FrameStore(frames * num_windows, SHAPE, CPU)
        schedule = make_schedule("unipc", 16, 5.0)
        denoiser = Denoiser(
            PlainNetwork(pseudo_network), store, schedule, counter_noise(0, SHAPE), guidance_scale=5.0, window_batch=8
        )
        windows = [Window(np.arange(frames) + frames * i, 1, frames - 1) for i in range(num_windows)]
        denoiser.run(windows)
        calls = 0

        def observe(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        gc.disable()  # what it would find of other tests makes calls, too
        sys.setprofile(observe)
        try:
            denoiser.run(windows)
        finally:
            sys.setprofile(None)
            gc.enable()
        return calls

    assert count(5) == count(21) == count(64)


RANK = """
import sys
import torch, torch.distributed as dist
import test_denoise
from miga_engine.runtime.ranks import Ranks
rank, count, folder, batch = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
calls = 0
def counted(*arguments):
    global calls
    calls += arguments[0].shape[0] // 2
    return test_denoise.pseudo_network(*arguments)
ranks = Ranks()
torch.save((test_denoise.video(window_batch=batch, network=counted, ranks=ranks), calls), f"{folder}/{rank}.pt")
ranks.close()
"""


def start_ranks(script: str, count: int, folder: Path, window_batch: int) -> list[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [[str(rank), str(count), str(folder), str(window_batch)] for rank in range(count)]
    return [
        subprocess.Popen([sys.executable, "-c", script, *rest], env=environment, stderr=subprocess.PIPE, text=True)
        for rest in arguments
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "window_batch"), [(2, 1), (3, 2)])
def test_ranks_make_the_same_video_bit_for_bit(tmp_path: Path, count: int, window_batch: int) -> None:
    for process in start_ranks(RANK, count, tmp_path, window_batch):
        assert process.wait(timeout=120) == 0, process.stderr.read()
    alone = video(window_batch=window_batch)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    assert all(torch.equal(latents, alone) for latents, _ in results)
    calls = [calls for _, calls in results]
    assert max(calls) < 0.75 * sum(calls)  # the work was shared


@pytest.mark.slow
def test_a_lost_rank_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    script = RANK.replace("torch.save(", "import os\nif rank == 1: os._exit(9)\ntorch.save(")
    processes = start_ranks(script, 2, tmp_path, 1)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[0].returncode != 0
    assert "DeviceError: rank 0 of 2 lost touch with the others" in errors[0]
