"""Runs of a toy network: streamed latents equal whole-sequence passes bit for bit, at every length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracle import SHAPE, Oracle, PlainNetwork, collect, counter_noise, pseudo_network, toy_config, toy_run

from miga_engine.config import fifo_config
from miga_engine.presets import PRESETS
from miga_engine.runtime.denoise import Denoiser
from miga_engine.runtime.reflection import Reflection
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [
    *((name, {}) for name in PRESETS), *((name, {"refine_steps": 3}) for name in ("tiny", "wan2.1", "videocrafter2")),
    ("tiny", {"commit_offset": 5, "past_context": True}), ("wan2.1", {"commit_offset": 7}),
])  # fmt: skip
def test_until_it_has_parted_a_run_does_what_an_endless_one_does(name, changes, monkeypatch):
    """In integers, over lengths: the state that is kept to be extended is one that any longer run has too."""
    monkeypatch.setattr(Denoiser, "run", _count_steps)
    monkeypatch.setattr(Reflection, "after_pass", lambda self, head, tail, then: then())
    preset, window = PRESETS[name], 16 if "videocrafter2" in name else 21
    config = dataclasses.replace(preset.miga, **changes)
    steps = preset.sampling.num_inference_steps

    def start(num_frames: int | None) -> VideoRun:
        run = toy_run(config, num_frames, steps=steps, window=window)
        run.denoiser.trace = []
        return run

    def state(run: VideoRun) -> Any:
        return run.stage, run.head, run.tail, run.emitted, list(run.unified.done), run.store.step_index.tolist()

    endless = start(None)
    states = [state(endless)]
    while endless.head < 220:
        endless.tick()
        states.append(state(endless))
    first = len(name) % 3  # each case takes a third of the lengths, together all
    for num_frames in [*range(1 + first, 30, 3), *range(30 + 9 * first, 201, 27)]:
        run, number, num_seen = start(num_frames), 0, 0
        while not run.has_parted:
            assert state(run) == states[number], num_frames
            is_next = run.parts_next
            run.tick()
            number += 1
            assert is_next == run.has_parted
            new = run.denoiser.trace[num_seen:]
            assert new == endless.denoiser.trace[num_seen : num_seen + len(new)] or run.has_parted
            num_seen += len(new)
        while run.stage != "done":
            run.tick()
        assert run.emitted == num_frames


def _count_steps(self, windows, *, noise_series=0, then=lambda: None):
    """A pass in integers alone."""
    for window in windows:
        self.trace.append(window.committed.tolist())
        self.store.step_index[window.committed] += 1
    then()


@pytest.mark.slow
@pytest.mark.parametrize("refine_steps", [0, 6])
@pytest.mark.parametrize("num_frames", [4, 9, 31, 50, 64])
def test_streamed_equals_whole_sequence_bit_for_bit(num_frames, refine_steps):
    config = toy_config(refine_steps=refine_steps)
    oracle = Oracle(pseudo_network, make_schedule("unipc", 16, 5.0), config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(collect(toy_run(config, num_frames)), oracle.run(num_frames))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"zigzag_width": 7}, {"stride": 7, "zigzag_width": 1}, {"guidance_frames": 0},
                                     {"stage2_steps": 0}, {"stage2_steps": 0, "refine_steps": 3},
                                     {"guidance_anchor": True}, {"commit_offset": 3}, {"commit_offset": 1},
                                     {"commit_offset": 2, "refine_steps": 3}, {"guidance_spacing": 3},
                                     {"tail_signal": 0.1}, {"tail_signal": 0.2, "zigzag_width": 1, "commit_offset": -1},
                                     {"commit_offset": 5, "stride": 2}, {"commit_offset": 2, "guidance_frames": 0},
                                     {"commit_offset": 1, "stage2_steps": 0, "refine_steps": 3},
                                     {"history_guidance": "distant"},
                                     {"past_context": True, "commit_offset": -1, "stage2_steps": 0},
                                     {"past_context": True, "commit_offset": -1, "refine_steps": 3},
                                     {"past_context": True, "commit_offset": 3, "stage2_steps": 0, "refine_steps": 3},
                                     {"past_context": True, "commit_offset": -1, "guidance_frames": 1,
                                      "zigzag_width": 1, "guidance_anchor": True, "history_guidance": "all"},
                                     {"past_context": True, "commit_offset": 2, "stage2_steps": 0, "zigzag_width": 1,
                                      "guidance_anchor": True, "history_guidance": "all"},
                                     {"history_guidance": "all", "commit_offset": 2, "guidance_frames": 0,
                                      "zigzag_width": 1, "refine_steps": 3},
                                     {"history_guidance": "all", "commit_offset": -1,
                                      "guidance_anchor": True},
                                     {"history_guidance": "distant", "commit_offset": -1, "zigzag_width": 1,
                                      "guidance_anchor": True, "guidance_frames": 1}])  # fmt: skip
def test_streamed_equals_whole_sequence_over_configurations(options):
    config = toy_config(**options)
    oracle = Oracle(pseudo_network, make_schedule("unipc", 16, 5.0), config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(collect(toy_run(config, 40)), oracle.run(40))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"passes_per_advance": 5, "stage2_steps": 1, "zigzag_width": 3},
                                     {"passes_per_advance": 4, "stage2_steps": 0, "refine_steps": 3},
                                     {"passes_per_advance": 3, "stage2_steps": 4, "commit_offset": -1,
                                      "guidance_anchor": True, "history_guidance": "all",
                                      "past_context": True}])  # fmt: skip
def test_a_queue_whose_groups_are_several_steps_apart_equals_whole_sequence(options):
    config = toy_config(**options)
    oracle = Oracle(pseudo_network, make_schedule("unipc", 16, 5.0), config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(collect(toy_run(config, 40)), oracle.run(40))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "reference_sigma"), [("unipc", None), ("lcm", 0.0), ("unipc", 0.02)])
@pytest.mark.parametrize(("num_given", "options"), [
    (1, {"guidance_anchor": True, "zigzag_width": 1, "commit_offset": -1}),
    (1, {"refine_steps": 3}), (5, {"stage2_steps": 0, "refine_steps": 3}), (9, {}),
    (4, {"passes_per_advance": 5, "stage2_steps": 1}),
    (7, {"past_context": True, "commit_offset": -1, "guidance_frames": 1, "zigzag_width": 1, "guidance_anchor": True,
         "history_guidance": "all", "refine_steps": 2}),
    (9, {"guidance_frames": 0, "commit_offset": -1, "past_context": True}),
    (8, {"zigzag_width": 2, "commit_offset": 2, "tail_signal": 0.1}), (3, {"guidance_frames": 0, "stage2_steps": 0}),
])  # fmt: skip
def test_a_video_begins_with_what_is_given_and_goes_on_as_whole_sequence_passes_do(
    num_given, options, reference_sigma, solver
):
    config = toy_config(**options)
    schedule = make_schedule(solver, 16, 5.0, reference_sigma=reference_sigma)
    given = torch.randn(num_given, *SHAPE, generator=torch.Generator().manual_seed(num_given))
    oracle = Oracle(pseudo_network, schedule, config, 9, counter_noise(5, SHAPE), 5.0, list(given))
    run = toy_run(config, 40, schedule=schedule, given=given)
    first = run.tick()
    assert first.first_frame == 0
    assert torch.equal(first.latents, given)  # at once, and untouched
    made = torch.cat([first.latents, *(clean.latents for clean in run)])
    assert torch.equal(made, oracle.run(40))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("boundary_step", [3, 6, 11, 14])
def test_each_window_goes_to_the_network_of_its_levels_with_the_scale_of_that(boundary_step, order):
    """Searches, Stage 2 and refine included: what commits frames of one network reads no noise of the other's."""
    schedule = make_schedule("unipc", 16, 5.0)
    seen = []

    class Two(PlainNetwork):
        def prepare(self, expert):
            seen.append(expert)

        def __call__(self, batch):
            assert seen[-1] == batch.expert
            kept = batch.steps.gather(1, batch.keep)
            assert ((kept >= boundary_step) == bool(batch.expert)).all()
            return super().__call__(batch)

    def run_of(**options):
        config = toy_config(refine_steps=2, self_reflection=True, judge_step=3, score_drop=0.0, window_order=order,
                            window_batch=4, **options)  # fmt: skip
        return VideoRun(
            Two(pseudo_network), schedule, config, window_frames=9, frame_shape=SHAPE, noise=counter_noise(5, SHAPE),
            num_frames=40, boundary_step=boundary_step, guidance_scale=5.0, guidance_scale_low=2.0, device=CPU,
        )  # fmt: skip

    made = collect(run_of())
    assert len(made) == 40
    assert {*seen} == {0, 1}
    run = run_of()
    scales = run.denoiser.guidance._levels[:, 0]
    assert scales.tolist() == [5.0] * boundary_step + [2.0] * (16 - boundary_step)


def test_a_clip_that_fills_the_window_goes_on_as_fifo_does():
    """The whole first queue is given or stands before it, and nothing of it changes: the first pass is over nothing."""
    config = fifo_config(toy_config(), 9)
    given = torch.randn(9, *SHAPE)
    run = toy_run(config, 30, given=given)
    made = collect(run)
    assert torch.equal(made[:9], given)
    assert len(made) == 30
    assert not torch.equal(made[9:18], made[18:27])


def test_the_anchor_guides_the_windows_of_its_own_prompt_and_follows_the_prompt():
    changed_at = 23
    run = VideoRun(
        PlainNetwork(pseudo_network), make_schedule("unipc", 16, 5.0), toy_config(guidance_anchor=True),
        window_frames=9, frame_shape=SHAPE, noise=counter_noise(5, SHAPE), num_frames=90, guidance_scale=5.0,
        device=CPU, prompt_row=lambda frame: 1 if frame < changed_at else 2,
    )  # fmt: skip
    store, anchor = run.store, run.references.anchor[0]
    anchors, queue_windows = {}, run.references.windows

    def watched(cuts, layout):
        windows = queue_windows(cuts, layout)
        number = int(store.frame_number[anchor])
        if number not in anchors:
            anchors[number] = store.sample[anchor].clone()
        assert torch.equal(store.sample[anchor], anchors[number])  # as long as it guides, it stays as it is
        assert store.step_index[anchor] == 16
        for window in windows[2:]:  # the first two may start too early for guidance
            rows = store.prompt_row[window.slots[2:]]
            assert (window.slots[0] == anchor) == bool((rows == store.prompt_row[anchor]).all())
            assert anchor not in window.slots[1:]
        return windows

    predicted, pop_group = [], run._pop_group

    def popped():
        if changed_at in range(run.head, run.head + 3):
            predicted.append(store.x0[store.slots([changed_at])[0]].clone())
        pop_group()

    run.references.windows, run._pop_group = watched, popped
    collect(run)
    assert list(anchors) == [0, changed_at]
    assert store.prompt_row[anchor] == 2
    assert torch.equal(anchors[changed_at], predicted[0])  # as clean as the network then takes it to be


@pytest.mark.slow
@pytest.mark.parametrize("window_batch", [2, 5])
def test_window_batch_changes_nothing_but_rounding(window_batch):
    whole = collect(toy_run(toy_config(refine_steps=4), 40))
    batched = collect(toy_run(toy_config(refine_steps=4, window_batch=window_batch), 40))
    assert (whole - batched).abs().max() <= 2e-6


@pytest.mark.slow
def test_endless_stream_begins_like_a_long_video():
    run = toy_run(toy_config(refine_steps=3), None)
    parts = []
    for clean in run:
        parts.append(clean.latents)
        if clean.first_frame > 60:
            break
    endless = torch.cat(parts)
    finite = collect(toy_run(toy_config(refine_steps=3), 300))
    assert torch.equal(endless, finite[: len(endless)])


@pytest.mark.slow
def test_seeds_reproduce_and_differ():
    config = toy_config(self_reflection=True, judge_step=4, score_drop=0.001, candidates=2)
    first = collect(toy_run(config, 30))
    assert torch.equal(first, collect(toy_run(config, 30)))
    assert not torch.equal(first, collect(toy_run(config, 30, seed=6)))


@pytest.mark.slow
def test_memory_is_bounded_and_first_frames_leave_early():
    run = toy_run(toy_config(refine_steps=4), 400)
    rows = run.store.sample.shape[0]
    emitted_at = []
    for clean in run:
        emitted_at.append((run.denoiser.num_forwards, clean.first_frame))
        assert run.tail - run.emitted <= run.store.capacity
    assert run.store.sample.shape[0] == rows
    assert emitted_at[0][0] < 0.25 * run.denoiser.num_forwards
