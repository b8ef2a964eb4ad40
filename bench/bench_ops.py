"""The ops on the CPU at the embedded model's size, against a loop over frames and the eager oracle: `make bench`.

One group an op; the ratio of its rows is the result, the times themselves mean little on a shared machine.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from miga_engine import ops
from miga_engine.ops import reference
from miga_engine.schedule import make_schedule

FRAMES, SHAPE = 76, (16, 8, 12)


@pytest.fixture(scope="module")
def queue() -> dict:
    generator = torch.Generator().manual_seed(0)
    schedule = make_schedule("unipc", 24, 3.0)
    state = [torch.randn(FRAMES, *SHAPE, generator=generator) for _ in range(4)]
    velocity = [torch.randn(FRAMES, *SHAPE, generator=generator) for _ in range(2)]
    steps = torch.arange(FRAMES).flip(0) // 4
    indices = {"slots": torch.arange(FRAMES), "step_index": steps, "history_length": steps.clamp(max=2)}
    return {"state": state, "velocity": velocity, "indices": indices, "rows": schedule.coefficients.rows}


def _update(implementation: Callable[..., None], queue: dict, frames: slice) -> None:
    implementation(
        *queue["state"], *(v[frames] for v in queue["velocity"]), coefficients=queue["rows"], guidance_scale=5.0,
        **{name: index[frames] for name, index in queue["indices"].items()},
    )  # fmt: skip


@pytest.mark.benchmark(group="sampler_update, a queue of 76 frames")
@pytest.mark.parametrize("implementation", [ops.sampler_update, reference.sampler_update], ids=["op", "eager"])
def bench_sampler_update(benchmark, queue, implementation):
    benchmark.pedantic(_update, (implementation, queue, slice(None)), rounds=7, warmup_rounds=1)


@pytest.mark.benchmark(group="sampler_update, a queue of 76 frames")
def bench_sampler_update_eager_frame_by_frame(benchmark, queue):
    def loop() -> None:
        for i in range(FRAMES):
            _update(reference.sampler_update, queue, slice(i, i + 1))

    benchmark.pedantic(loop, rounds=7, warmup_rounds=1)


@pytest.mark.benchmark(group="consistency_score, 8 against 3 x 4 frames, all channels")
@pytest.mark.parametrize("implementation", [ops.consistency_score, reference.consistency_score], ids=["op", "eager"])
def bench_consistency_score(benchmark, implementation):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(8, *SHAPE, generator=generator), torch.randn(3, 4, *SHAPE, generator=generator)
    benchmark.pedantic(implementation, (*frames, "all"), rounds=7, warmup_rounds=1)
