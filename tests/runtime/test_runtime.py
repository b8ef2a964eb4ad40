"""The runtime against the goldens' schedules and numbers, and against the list-based oracle, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import places
import pytest
import torch
from oracle import Oracle, PlainNetwork, counter_noise, pseudo_network
from safetensors.torch import load_file

from miga_engine.config import PRESETS, MigaConfig, fifo_config
from miga_engine.errors import ConfigError
from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import Denoiser, Window
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.reflection import Reflection
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.window_plan import guidance_indices, iter_windows, next_cut, plan_windows
from miga_engine.schedule import add_noise, make_schedule

GOLDENS = places.GOLDENS / "queue_wan"
CPU = torch.device("cpu")

# Where ALGORITHM.md departs from the release on purpose, and how the replays below switch to the release's way.
RELEASE_DIFFERENCES = {
    "guidance_offset": "3 at every zigzag width in the release; ⌊Z/2⌋ here (equal at the official Z = 7)",
    "warmup_in_place": "the release's warm-up commits window by window; here windows read the state before the pass",
    "tail_noise": "the release pushes the last clean seed frame re-noised to σ≈1; here Gaussian noise",
    "stage2_label": "the release tells Stage 2 a step one too early and stops one step before clean",
    "early_stage1": "the release enters Stage 1 with an unfilled queue when asked for few iterations",
    "no_append": "the release stops pushing when at most T − 14 iterations were asked for",
    "reflection_only_in_warmup": "the release judges in warm-up only, from the second possible group on; here always",
}


# Plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["leading", "trailing"])
@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_every_frame_is_committed_exactly_once_and_read_in_bounds(window, commit):
    for stride in range(1, window + 1):
        padding = window - stride if commit == "trailing" else 0
        for num_frames in range(1 + padding, 3 * window + 3):
            for phase in range(stride if commit == "leading" else 1):
                plan = plan_windows(num_frames, window, stride, phase, commit)
                committed = [frame for _, first, stop in plan for frame in range(first, stop)]
                assert committed == list(range(padding, num_frames))
                for start, first, stop in plan:
                    assert 0 <= start <= first < stop <= min(start + window, num_frames)


def test_endless_cuts_are_those_of_a_long_finite_sequence():
    for window, stride in ((9, 4), (21, 10), (5, 5)):
        for phase in range(stride):
            finite = list(iter_windows(1000, window, stride, phase))[:20]
            start = 0
            for expected_start, _, expected_stop in finite:
                assert start == expected_start
                start = next_cut(start, None, window, stride, phase)
                assert start == expected_stop


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 9, 4), "num_frames is 0: give at least 1"),
        ((5, 4, 5), "stride is 5: give a number between 1 and the window"),
        ((5, 4, 2, 2), "phase is 2: give a number between 0 and stride"),
        ((5, 4, 2, 0, "middle"), "commit is 'middle': give 'leading' or 'trailing'"),
        ((2, 4, 2, 0, "trailing"), "more than the 2 frames of padding"),
    ],
)
def test_plan_refuses(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan_windows(*arguments)


def _planned(event: dict, config: dict) -> list[tuple]:
    """Our plan of a golden event, in the goldens' terms: (start, committed frames, frames read, guidance)."""
    stride = config.get("slide", 10)
    num_frames, is_guided = event["queue_len"], event["phase"] in ("process_1", "stage_1")
    memory = config["mem"] if is_guided else 0
    window = config["F"] - memory
    if event["phase"] in ("process_1", "reflect"):
        phase = (num_frames - window) % stride if num_frames >= window else 0
    else:
        phase = event["iter"] % stride
    result = []
    for start, _, stop in plan_windows(num_frames, window, stride, phase):
        guidance = guidance_indices(start, memory, config["saw"], offset=3)
        length = window if guidance or not is_guided else config["F"]
        frames = guidance + list(range(start, min(start + length, num_frames)))
        result.append((start, stop - start, frames, guidance))
    return result


@pytest.mark.parametrize("name", ["official", "small_append", "small_noappend", "reflect_thr", "reflect_force", "t14"])
def test_window_plans_equal_the_release(name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    events = [event for event in golden["events"] if event.get("windows")]
    assert events
    for event in events:
        recorded = [(w["start"], w["cal_len"], w["frames"], w["guidance"]) for w in event["windows"]]
        assert _planned(event, golden["cfg"]) == recorded, (event["phase"], event["iter"])


# Numbers ---------------------------------------------------------------------------------------------------------


class ReleaseReplay:
    """Drives our denoising pass through the release's schedule, with RELEASE_DIFFERENCES the release's way."""

    def __init__(
        self, config: dict, events: list[dict], initial: torch.Tensor, tape: torch.Tensor, network=pseudo_network
    ):
        self.config, self.events, self.initial, self.tape = config, events, initial, tape
        self.schedule = make_schedule("unipc", config["T"], config.get("shift", 5.0))
        self.store = FrameStore(2048, tuple(initial.shape[1:]), CPU, scratch=512)
        scale = config.get("guide", 5.0)
        self.denoiser = Denoiser(
            PlainNetwork(network), self.store, self.schedule, self.candidate_noise, guidance_scale=scale
        )
        self.queue: list[int] = []
        self.next_slot = 0
        self.cursor = 0
        self.reports: list[dict] = []
        self.reflection = None
        if config.get("resample"):
            options = MigaConfig(
                zigzag_width=config["saw"], guidance_frames=config["mem"], stride=config["slide"], candidates=3,
                judge_step=10, reference_groups=2, score_drop=config["thr"], window_order="sequential",
            )  # fmt: skip
            self.reflection = Reflection(self.denoiser, options, config["F"], config["slide"], self.report)

    @classmethod
    def of_queue(cls, name: str) -> ReleaseReplay:
        golden = json.loads((GOLDENS / f"{name}.json").read_text())
        tape = load_file(GOLDENS / f"{name}.safetensors")["noise_tape"].transpose(0, 1)
        config, F = golden["cfg"], golden["cfg"]["F"]
        unused = config["T"] * config["saw"]  # a draw the release never uses
        replay = cls(config, golden["events"], tape[:F], tape[F + unused :])
        replay.judged = {r["iter"] for r in golden.get("reflection", ()) if r["kind"] == "trigger"}
        return replay

    def report(self, kind: str, **data) -> None:
        self.reports.append({"kind": kind, **data})

    def draw(self, count: int) -> torch.Tensor:
        self.cursor += count
        return self.tape[self.cursor - count : self.cursor]

    def candidate_noise(self, purpose: Purpose, numbers: np.ndarray, *, series: int = 0) -> torch.Tensor:
        """The tape runs candidate by candidate, the search round by round."""
        length = 10 * self.config["saw"]
        first = self.cursor + series % 3 * length + int(numbers[0]) - self.reports[-1]["frame"]
        return self.tail_noise(self.tape[first : first + len(numbers)])

    def tail_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return add_noise(self.schedule, self.last_seed_frame.expand_as(noise), noise, 0)

    def add(self, sample: torch.Tensor, step: int) -> list[int]:
        slots = np.arange(self.next_slot, self.next_slot + len(sample))
        self.next_slot += len(sample)
        self.store.put(slots, sample, step_index=step, numbers=slots.tolist())
        self.store.prompt_row[slots] = 1
        return slots.tolist()

    def run_event(self, event: dict) -> None:
        self.denoiser.order = "sequential" if event["phase"] == "process_1" else "parallel"
        queue = np.array(self.queue)
        windows = []
        for _, count, frames, guidance in _planned(event, self.config):
            windows.append(Window(queue[frames], len(guidance), len(guidance) + count))
        self.denoiser.run(windows)
        if self.reflection is not None and event["phase"] == "process_1" and event["iter"] in self.judged:
            searches = self.reflection.num_searches
            self.reflection.after_pass(self.queue[0], self.queue[-1] + 1)
            self.cursor += (self.reflection.num_searches - searches) * 3 * 10 * self.config["saw"]

    def samples(self, slots: list[int]) -> torch.Tensor:
        return self.store.sample[torch.tensor(slots)]

    def replay(self) -> dict[str, torch.Tensor]:
        T, Z, F = self.config["T"], self.config["saw"], self.config["F"]
        clip = self.add(self.initial, 0)
        for _ in range(T):
            self.denoiser.run([Window(np.array(clip), 0, F)])
        seed = self.samples(clip).clone()
        result = {"initial_latent": seed}
        groups = F // Z
        for g in range(groups):
            part = seed[g * Z : (g + 1) * Z]
            self.queue += self.add(add_noise(self.schedule, part, self.draw(Z), groups - g), groups - g)

        self.last_seed_frame = seed[groups * Z - 1]
        saved: list[int] = []
        for event in self.events:
            phase = event["phase"]
            if phase in ("init", "reflect"):
                continue
            if phase == "stage_1" and event["saved"] > len(saved):
                self._pop(saved, event["saved"] - len(saved))
            if phase == "stage_2" and event["iter"] == 0:
                self._pop(saved, Z)
                result["saved_after_stage1"] = self.samples(saved).clone()
                self._restart(saved, T - 11)
            if phase == "renoise" and event["iter"] == 0:
                result["after_stage2"] = self.samples(saved).clone()
                noised = add_noise(self.schedule, self.samples(saved), self.tape[-len(saved) :], T - 10)
                self.store.sample[torch.tensor(saved)] = noised
                self._restart(saved, T - 10)
            if phase in ("stage_2", "renoise"):
                self.queue = saved
            elif len(self.queue) < event["queue_len"]:
                self.queue += self.add(self.tail_noise(self.draw(Z)), 0)
            if phase == "stage_1" and event["iter"] == 0:
                result["queue_after_process1"] = self.samples(self.queue).clone()
            steps = [int(self.store.step_index[slot]) for slot in self.queue]
            recorded = [step for step, count in event["queue_steps_rle"] for _ in range(count)]
            assert steps == recorded, (phase, event["iter"])
            self.run_event(event)
        result["final_all"] = self.samples(saved).clone()
        return result

    def _pop(self, saved: list[int], count: int) -> None:
        saved += self.queue[:count]
        self.queue = self.queue[count:]

    def _restart(self, slots: list[int], step: int) -> None:
        self.store.step_index[slots] = step
        self.store.history_length[slots] = 0


def _difference(ours: dict[str, torch.Tensor], golden: dict[str, torch.Tensor], prefix: str = "") -> dict[str, float]:
    shared = {key: golden[prefix + key].transpose(0, 1) for key in ours if prefix + key in golden}
    assert "final_all" in shared
    return {key: float((ours[key] - tensor).abs().max()) for key, tensor in shared.items()}


@pytest.mark.parametrize("name", ["small_append", "small_noappend", "official", "reflect_thr", "reflect_force"])
def test_replay_of_the_release_reproduces_its_latents(name):
    replay = ReleaseReplay.of_queue(name)
    errors = _difference(replay.replay(), load_file(GOLDENS / f"{name}.safetensors"))
    assert max(errors.values()) <= 1e-5, errors
    recorded = json.loads((GOLDENS / f"{name}.json").read_text()).get("reflection", [])
    scores = [r["score"] for r in recorded]
    ours = []
    for report in replay.reports:
        ours += report["scores"] if report["kind"] == "search_finished" else []
        ours += [report["score"]] if report["kind"] == "score" else []
    assert ours == pytest.approx(scores, abs=1e-5)


def release_events(config: dict) -> list[dict]:
    """The release's schedule without its windows, as the goldens record it (phase, iteration, queue at its start)."""
    T, Z, groups = config["T"], config["saw"], config["F"] // config["saw"]
    events, head = [], groups
    appends = config["iters"] > T - 14
    for i in range(min(config["iters"], T - 15)):
        queue = list(range(head, -1, -1))
        events.append({"phase": "process_1", "iter": i, "queue_steps_rle": [[step, Z] for step in queue]})
        head += 1
    queue = [step + 1 for step in queue]
    saved, i = 0, 0
    while saved < config["iters"] * Z:
        queue = [*queue, 0] if appends else queue
        rle = [[step, Z] for step in queue]
        events.append({"phase": "stage_1", "iter": i, "queue_steps_rle": rle, "saved": saved})
        queue = [step + 1 for step in queue]
        if queue[0] == T - 10:
            queue, saved = queue[1:], saved + Z
        i += 1
    for phase, first in (("stage_2", T - 11), ("renoise", T - 10)):
        events += [{"phase": phase, "iter": i, "queue_steps_rle": [[first + i, saved]]} for i in range(10)]
    for event in events:
        event["queue_len"] = sum(count for _, count in event["queue_steps_rle"])
    return events


@pytest.mark.parametrize("name", ["small_append", "small_noappend", "official"])
def test_release_schedule_is_understood(name):
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    ours = release_events(golden["cfg"])
    recorded = [event for event in golden["events"] if event["phase"] != "init"]
    assert [{key: event[key] for key in mine} for mine, event in zip(ours, recorded, strict=True)] == ours


@pytest.mark.parametrize(("name", "judged"), [("e2e_small", set()), ("e2e_reflect", {9, 10, 11})])
def test_whole_line_with_a_network_equals_the_release(name, judged):
    """Seed clip to refined latents and first video frames with the goldens' DiT and VAE, the head done right."""
    from miga_engine.models import load_transformer, load_vae

    root = GOLDENS.parent
    record = json.loads((root / "e2e_wan" / f"{name}.json").read_text())
    tensors = load_file(root / "e2e_wan" / f"{name}.safetensors")
    config = record["cfg"]
    transformer = load_transformer(root / "wan_dit" / "official", "cpu", torch.float32)
    texts = load_file(root / "wan_dit" / "io.safetensors")
    rows = [texts["context_1"], texts["context_0"]]  # row 0 is the unconditional branch
    length = max(len(row) for row in rows)
    context = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])

    @torch.no_grad()
    def network(latents, timesteps, prompt_rows):
        return transformer(latents, timesteps, context, context_index=prompt_rows)

    replay = ReleaseReplay(
        config, release_events(config), tensors["noise_initial"].transpose(0, 1),
        tensors["noise_frames"].transpose(0, 1), network,
    )  # fmt: skip
    replay.judged = judged
    results = replay.replay()
    errors = _difference(results, tensors, "headfixed_")
    assert max(errors.values()) <= 5e-4, errors
    scores = [report["score"] for report in replay.reports if report["kind"] == "score"]
    kept = [judge["score"] for judge in record["info"]["headfixed"]["judge"] if judge["n_new"] > judge["n_saved"]]
    assert scores == pytest.approx(kept, abs=1e-4)
    with torch.no_grad():
        video = load_vae(root / "wan_vae" / "official" / "Wan2.1_VAE.safetensors").decode(
            results["final_all"][:2].transpose(0, 1)[None]
        )
    assert (video[0] - tensors["headfixed_video_first2latents"]).abs().max() <= 5e-4


# Streaming equals whole-sequence passes --------------------------------------------------------------------------

SHAPE = (4, 2, 3)


def _run(
    config: MigaConfig, num_frames: int | None, *, steps=16, window=9, seed=5, events=None, network=pseudo_network
):
    return VideoRun(
        PlainNetwork(network), make_schedule("unipc", steps, 5.0), config, window_frames=window, frame_shape=SHAPE,
        noise=counter_noise(seed, SHAPE), num_frames=num_frames, guidance_scale=5.0, device=CPU,
        emit=lambda kind, **data: events.append((kind, data)) if events is not None else None,
    )  # fmt: skip


def _collect(run: VideoRun) -> torch.Tensor:
    parts, expected = [], 0
    for clean in run:
        assert clean.first_frame == expected
        expected += len(clean.latents)
        parts.append(clean.latents)
    return torch.cat(parts)


@pytest.mark.parametrize("refine_steps", [None, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_until_it_has_parted_a_run_does_what_an_endless_one_does(name, refine_steps, monkeypatch):
    """In integers, over lengths: the state that is kept to be extended is one that any longer run has too."""
    monkeypatch.setattr(Denoiser, "run", _count_steps)
    monkeypatch.setattr(Reflection, "after_pass", lambda self, head, tail, then: then())
    preset, window = PRESETS[name], 16 if "videocrafter2" in name else 21
    config = preset.miga if refine_steps is None else dataclasses.replace(preset.miga, refine_steps=refine_steps)
    steps = preset.sampling.num_inference_steps

    def start(num_frames: int | None) -> VideoRun:
        run = _run(config, num_frames, steps=steps, window=window)
        run.denoiser.trace = []
        return run

    def state(run: VideoRun) -> Any:
        return run.stage, run.head, run.tail, run.emitted, list(run.unified.done), run.store.step_index.tolist()

    endless = start(None)
    states = [state(endless)]
    while endless.head < 220:
        endless.tick()
        states.append(state(endless))
    for num_frames in [*range(1, 30), *range(30, 201, 9)]:
        run, number = start(num_frames), 0
        while not run.has_parted:
            assert state(run) == states[number], num_frames
            is_next = run.parts_next
            run.tick()
            number += 1
            assert is_next == run.has_parted
            assert run.denoiser.trace == endless.denoiser.trace[: len(run.denoiser.trace)] or run.has_parted
        while run.stage != "done":
            run.tick()
        assert run.emitted == num_frames


def _count_steps(self, windows, *, noise_series=0, then=lambda: None):
    """A pass in integers alone."""
    for window in windows:
        self.trace.append(window.committed.tolist())
        self.store.step_index[window.committed] += 1
    then()


def _config(**options) -> MigaConfig:
    defaults = {"zigzag_width": 3, "stage2_steps": 5, "guidance_frames": 2, "stride": 4, "self_reflection": False}
    return MigaConfig(**(defaults | options))


@pytest.mark.parametrize("refine_steps", [0, 6])
@pytest.mark.parametrize("num_frames", [4, 9, 31, 50, 64])
def test_streamed_equals_whole_sequence_bit_for_bit(num_frames, refine_steps):
    config = _config(refine_steps=refine_steps)
    oracle = Oracle(pseudo_network, make_schedule("unipc", 16, 5.0), config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(_collect(_run(config, num_frames)), oracle.run(num_frames))


@pytest.mark.parametrize("options", [{"zigzag_width": 7}, {"stride": 7, "zigzag_width": 1}, {"guidance_frames": 0},
                                     {"stage2_steps": 0}, {"stage2_steps": 0, "refine_steps": 3},
                                     {"guidance_anchor": True}])  # fmt: skip
def test_streamed_equals_whole_sequence_over_configurations(options):
    config = _config(**options)
    oracle = Oracle(pseudo_network, make_schedule("unipc", 16, 5.0), config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(_collect(_run(config, 40)), oracle.run(40))


def test_the_anchor_guides_the_windows_of_its_own_prompt_and_follows_the_prompt():
    changed_at = 23
    run = VideoRun(
        PlainNetwork(pseudo_network), make_schedule("unipc", 16, 5.0), _config(guidance_anchor=True), window_frames=9,
        frame_shape=SHAPE, noise=counter_noise(5, SHAPE), num_frames=90, guidance_scale=5.0, device=CPU,
        prompt_row=lambda frame: 1 if frame < changed_at else 2,
    )  # fmt: skip
    store, anchor = run.store, run._anchor[0]
    anchors, queue_windows = {}, run._queue_windows

    def watched(phase):
        windows = queue_windows(phase)
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

    run._queue_windows, run._pop_group = watched, popped
    _collect(run)
    assert list(anchors) == [0, changed_at]
    assert store.prompt_row[anchor] == 2
    assert torch.equal(anchors[changed_at], predicted[0])  # as clean as the network then takes it to be


@pytest.mark.parametrize("window_batch", [2, 5])
def test_window_batch_changes_nothing_but_rounding(window_batch):
    whole = _collect(_run(_config(refine_steps=4), 40))
    batched = _collect(_run(_config(refine_steps=4, window_batch=window_batch), 40))
    assert (whole - batched).abs().max() <= 2e-6


def test_endless_stream_begins_like_a_long_video():
    run = _run(_config(refine_steps=3), None)
    parts = []
    for clean in run:
        parts.append(clean.latents)
        if clean.first_frame > 60:
            break
    endless = torch.cat(parts)
    finite = _collect(_run(_config(refine_steps=3), 300))
    assert torch.equal(endless, finite[: len(endless)])


def test_seeds_reproduce_and_differ():
    config = _config(self_reflection=True, judge_step=4, score_drop=0.001, candidates=2)
    first = _collect(_run(config, 30))
    assert torch.equal(first, _collect(_run(config, 30)))
    assert not torch.equal(first, _collect(_run(config, 30, seed=6)))


def test_memory_is_bounded_and_first_frames_leave_early():
    run = _run(_config(refine_steps=4), 400)
    rows = run.store.sample.shape[0]
    emitted_at = []
    for clean in run:
        emitted_at.append((run.denoiser.num_forwards, clean.first_frame))
        assert run.tail - run.emitted <= run.store.capacity
    assert run.store.sample.shape[0] == rows
    assert emitted_at[0][0] < 0.25 * run.denoiser.num_forwards


# Self-reflection -------------------------------------------------------------------------------------------------


def test_reflection_adopts_only_better_candidates_and_reports_them():
    events: list = []
    config = _config(self_reflection=True, judge_step=4, score_drop=0.0, candidates=3)
    _collect(_run(config, 40, events=events))
    searches = [data for kind, data in events if kind == "search_finished"]
    assert searches
    for search in searches:
        assert search["adopted"] == (max(search["scores"]) > search["score"])
    assert any(s["adopted"] for s in searches)
    assert [s["search"] for s in searches] == list(range(len(searches)))


def test_reflection_with_an_unreachable_threshold_changes_nothing():
    config = _config(self_reflection=True, judge_step=4, score_drop=10.0)
    assert torch.equal(_collect(_run(config, 30)), _collect(_run(_config(), 30)))


def test_candidates_batch_without_changing_the_result():
    options = {"self_reflection": True, "judge_step": 4, "score_drop": 0.0, "candidates": 3}
    alone = _collect(_run(_config(**options), 30))
    together = _collect(_run(_config(**options, window_batch=6), 30))
    assert (alone - together).abs().max() <= 2e-6


@pytest.mark.parametrize("has_anchor", [False, True])
def test_searches_read_the_anchor_of_their_own_prompt(has_anchor):
    config = _config(self_reflection=True, judge_step=4, score_drop=0.0, guidance_anchor=has_anchor)
    run = VideoRun(
        PlainNetwork(pseudo_network), make_schedule("unipc", 16, 5.0), config, window_frames=9, frame_shape=SHAPE,
        noise=counter_noise(5, SHAPE), num_frames=60, guidance_scale=5.0, device=CPU,
        prompt_row=lambda frame: 1 if frame < 33 else 2,
    )  # fmt: skip
    store, search_windows, searches = run.store, run.reflection._windows, []

    def watched(reference, candidates):
        windows = search_windows(reference, candidates)
        for window in windows:
            is_anchored = window.slots[0] in run._anchor
            rows = store.prompt_row[window.slots[int(is_anchored) :]]
            assert is_anchored == (has_anchor and bool((rows == store.prompt_row[run._anchor]).all()))
            assert len(window.slots) <= 9
            assert not np.isin(window.committed, [*run._anchor, *reference]).any()
            searches.append(is_anchored)
        committed = np.concatenate([window.committed for window in windows])
        assert sorted(committed) == sorted(candidates.ravel())  # each once
        return windows

    run.reflection._windows = watched
    _collect(run)
    assert True in searches if has_anchor else searches


@pytest.mark.parametrize("judge", ["latent", "x0"])
@pytest.mark.parametrize("channels", ["mean", "all"])
def test_every_judge_runs(judge, channels):
    events: list = []
    config = _config(self_reflection=True, judge_step=4, score_drop=0.0, judge=judge, channels=channels)
    latents = _collect(_run(config, 20, events=events))
    assert latents.isfinite().all()
    scores = [data["score"] for kind, data in events if kind == "score"]
    assert scores
    assert all(-1.001 <= score <= 1.001 for score in scores)


# FIFO-Diffusion --------------------------------------------------------------------------------------------------


FIFO_RECORD = {
    key: value
    for key, value in json.loads((GOLDENS.parent / "samplers" / "vc2_meta.json").read_text()).items()
    if key.startswith("fifo_run_")
}


def _fifo_network(latents, timesteps, rows):
    text = torch.where(rows == 0, -0.2, 0.1).view(-1, 1, 1, 1, 1)
    level = timesteps.view(len(latents), 1, -1, 1, 1) / 1000
    return torch.tanh(0.7 * latents + 0.3 * latents.mean(dim=2, keepdim=True) + 0.6 * level + text)


@pytest.mark.parametrize("lookahead", [1, 0])
def test_fifo_configuration_reproduces_fifo_diffusion(lookahead):
    """The published run: 4-frame windows, 4 partitions, DDIM eta 1, replayed from its noise tape."""
    tensors = load_file(GOLDENS.parent / "samplers" / "vc2_trajectories.safetensors")
    video, tape, expected = (
        tensors[f"fifo_run_lookahead{lookahead}_{key}"][0].transpose(0, 1)
        for key in ("video_init", "noise_tape", "frames_out")
    )
    preset, record = PRESETS["videocrafter2-fifo"], FIFO_RECORD[f"fifo_run_lookahead{lookahead}_cfg"]
    config = dataclasses.replace(preset.miga, stride=record["video_length"] // 2)
    if not lookahead:
        config = dataclasses.replace(config, commit="leading", stride=4)
    padding, window, steps = 2 * lookahead, 4, 16
    stride = window - padding
    num_windows = steps // stride

    def noise(purpose: Purpose, numbers: np.ndarray, *, series=0) -> torch.Tensor:
        if purpose == Purpose.WARMUP:
            return tape[padding : padding + len(numbers)]
        iteration_start = padding + steps + run.num_passes * (num_windows * window + 1)
        if purpose == Purpose.PUSH:
            return tape[iteration_start - 1 :][:1]
        position = numbers - run.head
        plan = position // stride  # the release visits windows from the noisiest to the cleanest
        index = (num_windows - 1 - plan) * window + position % stride + padding
        return tape[iteration_start + index]

    run = VideoRun(
        PlainNetwork(_fifo_network), make_schedule("ddim", steps, eta=preset.sampling.eta), config,
        window_frames=window, frame_shape=tuple(video.shape[1:]), noise=noise, num_frames=6, device=CPU,
        guidance_scale=preset.sampling.guidance_scale,
    )  # fmt: skip
    run._start_queue(video)
    # The release pads with frame 0 at its least noisy level, where we keep it clean.
    padded = run.store.slots(range(run.head - padding, run.head))
    run.store.sample[torch.from_numpy(padded)] = add_noise(
        run.schedule, video[:1].expand(padding, -1, -1, -1), tape[:padding], steps - 1
    )
    outputs = []
    for _ in range(len(expected)):
        head = run.store.slots([run.head])
        run.tick()
        outputs.append(run.store.sample[torch.from_numpy(head)].clone())
    assert (torch.cat(outputs) - expected).abs().max() <= 1e-4
    assert run.stage == "done"
    # Of the frames that leave the queue, the copies of frame 0 come first and are not part of the video.
    assert run.emitted == 6


def test_fifo_preset_is_the_published_run_at_the_models_size():
    sampling, miga = PRESETS["videocrafter2-fifo"].sampling, PRESETS["videocrafter2-fifo"].miga
    assert miga == fifo_config(miga, 16)
    assert (miga.commit, miga.warmup, miga.stride, miga.window_order) == ("trailing", "copies", 8, "parallel")
    assert (sampling.solver, sampling.use_scale_array) == ("ddim", False)
    for record in FIFO_RECORD.values():
        assert (sampling.eta, sampling.guidance_scale) == (record["eta"], record["cfg"])
        assert record["S"] == record["num_partitions"] * record["video_length"]
        assert sampling.num_inference_steps == record["num_partitions"] * 16


def test_fifo_from_noise_to_video():
    latents = _collect(_run(fifo_config(MigaConfig(), 9), 40, steps=27))
    assert latents.shape == (40, *SHAPE)
    assert latents.isfinite().all()
