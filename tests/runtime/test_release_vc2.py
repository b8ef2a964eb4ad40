"""The runtime against VideoCrafter2's release: its window plans, and its latents from recorded noise, eta 1."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from oracle import PlainNetwork, pseudo_network
from places import GOLDENS
from safetensors.torch import load_file

from miga_engine import ops
from miga_engine.config import MigaConfig
from miga_engine.models.videocrafter2.family import load_unet, load_vae
from miga_engine.noise import Purpose
from miga_engine.presets import PRESETS
from miga_engine.runtime.denoise import Denoiser, Window
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.reflection import FIRST_CANDIDATE_SERIES, Reflection
from miga_engine.runtime.window_plan import guidance_indices, plan_windows
from miga_engine.schedule import add_noise, make_schedule

CPU = torch.device("cpu")
NAMES = ("small", "small_break", "official", "reflect_force")
STRIDE = 8  # the release's, where a golden names none

# Where docs/method.md departs from the release on purpose, and how the replays below switch to the release's way.
RELEASE_DIFFERENCES = {
    "in_place": "every pass of the release commits window by window; here windows read the state before the pass",
    "warmup_tail": "the release's warm-up pushes the last clean seed frame re-noised to σ≈1; here Gaussian noise",
    "early_stage1": "the release enters Stage 1 one group early, or with a short queue when asked for few iterations",
    "identity_step": "the release leaves out the last step, which at eta 1 changes nothing; here it is taken",
    "reflection_score": "the release takes one cosine of the groups' mean maps; here the mean of all pairs' cosines",
    "reference_windows": "in a search the release also runs windows that commit reference frames only, and drops them",
    "reflection_only_in_warmup": "the release judges in warm-up only, from the second possible group on; here always",
    "no_scale": "the release scales x0 by level in the seed clip only; `use_scale_array` is for all steps or none",
}


def record_of(name: str) -> dict:
    return json.loads((GOLDENS / "queue_vc2" / f"{name}.json").read_text())


def planned(event: dict, config: dict) -> list[tuple[int, int, list[int], list[int]]]:
    """Our plan of an event, in the goldens' terms: (start, committed frames, frames read, guidance)."""
    stride, num_frames = config.get("slide", STRIDE), event["queue_len"]
    guidance_frames = config["mem"] if event["phase"] in ("process_1", "stage_1") else 0
    local = config["F"] - guidance_frames
    if event["phase"] in ("process_1", "reflect"):
        phase = max(num_frames - local, 0) % stride
    else:
        phase = event["iter"] % stride
    result = []
    for start, _, stop in plan_windows(num_frames, local, stride, phase):
        guidance = guidance_indices(start, guidance_frames, config["saw"])
        last = start + (local if guidance else config["F"])
        result.append((start, stop - start, guidance + list(range(start, min(last, num_frames))), guidance))
    return result


@pytest.mark.parametrize("name", [*NAMES, "official_reflect_early"])
def test_window_plans_equal_the_release(name):
    golden = record_of(name)
    assert len(golden["events"]) > 25
    for event in golden["events"]:
        recorded = [(w["start"], w["cal_len"], w["frames"], w["guidance"]) for w in event["windows"]]
        assert planned(event, golden["cfg"]) == recorded, (event["phase"], event["iter"])


def release_events(config: dict) -> list[dict]:
    """The release's schedule without its windows, as the goldens record it: what is at which DDIM index."""
    T, Z = config["T"], config["saw"]
    head = T - 1 - config["F"] // Z  # DDIM indices run from T − 1 (noise) down to 0
    queue = list(range(head, T))
    events, saved = [], 0
    for i in range(config["iters"]):
        if queue[0] == 11:
            break
        events.append({"phase": "process_1", "iter": i, "queue_steps_rle": [[index, Z] for index in queue]})
        queue = [index - 1 for index in queue]
        queue += [T - 1] if i + 1 < config["iters"] else []
    i = 0
    while saved < config["iters"] * Z:
        rle = [[index, Z] for index in queue]
        events.append({"phase": "stage_1", "iter": i, "queue_steps_rle": rle, "saved": saved})
        queue = [*(index - 1 for index in queue), T - 1]
        if queue[0] == 9:
            queue, saved = queue[1:], saved + Z
        i += 1
    for phase, first in (("stage_2", 9), ("renoise", 10)):
        events += [{"phase": phase, "iter": i, "queue_steps_rle": [[first - i, saved]]} for i in range(first)]
    for event in events:
        event["queue_len"] = sum(count for _, count in event["queue_steps_rle"])
    return events


@pytest.mark.parametrize("name", NAMES)
def test_release_schedule_is_understood(name):
    golden = record_of(name)
    ours = release_events(golden["cfg"])
    recorded = [event for event in golden["events"] if event["phase"] != "reflect"]
    assert [{key: event[key] for key in mine} for mine, event in zip(ours, recorded, strict=True)] == ours


class TapeDenoiser(Denoiser):
    """Window by window; each draws solver noise from the tape for every frame it reads, and uses its committed ones."""

    replay: ReleaseReplay

    def run(self, windows: list[Window], *, noise_series: int = 0) -> None:
        if noise_series >= FIRST_CANDIDATE_SERIES:
            self.replay.enter_search_pass(noise_series - FIRST_CANDIDATE_SERIES, len(windows))
        for window in windows:
            drawn = self.replay.draw(len(window.slots))
            self.replay.solver_noise = drawn[window.commit_start : window.commit_stop]
            super().run([window], noise_series=noise_series)


def release_judge(store: FrameStore, reference: np.ndarray, candidates: np.ndarray, config: MigaConfig) -> torch.Tensor:
    """One cosine of the maps that remain when channels and frames of a group are averaged."""
    mean = store.sample[torch.from_numpy(reference)].mean(dim=(0, 1))[None, None]
    groups = store.sample[torch.from_numpy(candidates)].mean(dim=(1, 2))[:, None, None]
    return ops.consistency_score(mean, groups, channels="mean")


class ReleaseReplay:
    """Drives our denoising pass through the release's schedule, with RELEASE_DIFFERENCES the release's way."""

    def __init__(self, config: dict, events: list[dict], clip: torch.Tensor, tape: torch.Tensor, network) -> None:
        self.config, self.events, self.clip, self.tape = config, events, clip, tape
        self.schedule = make_schedule("ddim", config["T"], eta=1.0)
        self.store = FrameStore(512, tuple(clip.shape[1:]), CPU, scratch=128)
        scale = config.get("cfg", 12.0)
        self.denoiser = TapeDenoiser(PlainNetwork(network), self.store, self.schedule, self.noise, guidance_scale=scale)
        self.denoiser.replay = self
        self.searches = {tuple(event["iter"]): event for event in events if event["phase"] == "reflect"}
        self.queue: list[int] = []
        self.cursor = self.num_slots = 0
        self.search_rounds = 0
        self.solver_noise: torch.Tensor
        self.reports: list[dict] = []
        self.reflection = None
        if config.get("resample"):
            options = MigaConfig(
                zigzag_width=config["saw"], judge_step=config["T"] - 1 - config["judged"], reference_groups=3,
                candidates=5, score_drop=config["thr"],
            )  # fmt: skip
            self.reflection = Reflection(self.denoiser, options, config["F"], config["slide"], self.report)
            self.reflection.judge = release_judge

    def report(self, kind: str, **data) -> None:
        self.reports.append({"kind": kind, **data})

    def draw(self, count: int) -> torch.Tensor:
        self.cursor += count
        return self.tape[self.cursor - count : self.cursor]

    def noise(self, purpose: Purpose, numbers: np.ndarray, *, series: int | np.ndarray = 0) -> torch.Tensor:
        if purpose == Purpose.SOLVER:
            return self.solver_noise
        assert purpose == Purpose.CANDIDATE
        assert isinstance(series, int)
        first = self._search_event(series, (int(numbers[0]) - self.reports[-1]["frame"]) // self.config["saw"])
        return self.tail_noise(self.tape[first["noise_draws_before"] - len(numbers) : first["noise_draws_before"]])

    def tail_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return add_noise(self.schedule, self.clip[-1].expand_as(noise), noise, 0)

    def _search_event(self, candidate: int, round_index: int) -> dict:
        return self.searches[self.iteration, candidate % 5, round_index]

    def enter_search_pass(self, candidate: int, num_windows: int) -> None:
        """The tape goes candidate by candidate, the search round by round; windows that are not run draw too."""
        event = self._search_event(candidate, self.search_rounds // 5)
        self.search_rounds += 1
        skipped = event["windows"][: len(event["windows"]) - num_windows]
        self.cursor = event["noise_draws_before"] + sum(len(window["frames"]) for window in skipped)

    def add(self, sample: torch.Tensor, step: int) -> None:
        slots = np.arange(self.num_slots, self.num_slots + len(sample))
        self.num_slots += len(sample)
        self.store.put(slots, sample, step_index=step, numbers=slots.tolist())
        self.store.prompt_row[slots] = 1
        self.queue += slots.tolist()

    def run_event(self, event: dict) -> None:
        queue = np.array(self.queue)
        windows = planned(event, self.config)
        self.denoiser.run([Window(queue[frames], len(g), len(g) + count) for _, count, frames, g in windows])

    def judge(self, event: dict) -> None:
        self.iteration, self.search_rounds = event["iter"], 0
        self.reflection.after_pass(self.queue[0], self.queue[-1] + 1)

    def samples(self, slots: list[int]) -> torch.Tensor:
        return self.store.sample[torch.tensor(slots)].clone()

    def replay(self, judged: set[int] = frozenset()) -> dict[str, torch.Tensor]:
        T, Z, F = (self.config[key] for key in ("T", "saw", "F"))
        result = {}
        groups = F // Z
        for g in range(groups):
            self.add(add_noise(self.schedule, self.clip[g * Z : (g + 1) * Z], self.draw(Z), groups - g), groups - g)
        saved: list[int] = []
        is_warmup = True
        for event in self.events:
            phase, i = event["phase"], event["iter"]
            if phase == "reflect":
                continue
            if phase == "stage_2" and i == 0:
                self._pop(saved, Z)
                result["popped_stage1"] = self.samples(saved)
                self.draw(Z)  # pushed, and never used
                self.queue = saved
            elif phase == "renoise" and i == 0:
                noise = self.draw(len(saved))
                self.store.sample[torch.tensor(saved)] = add_noise(self.schedule, self.samples(saved), noise, T - 11)
                self.store.step_index[saved] = T - 11
            elif phase == "stage_1":
                self._pop(saved, event["saved"] - len(saved))
            if len(self.queue) < event["queue_len"]:
                noise = self.draw(Z)
                self.add(self.tail_noise(noise) if is_warmup else noise, 0)
            is_warmup = phase == "process_1"
            if phase == "stage_1" and i == 0:
                result["queue_after_process1"] = self.samples(self.queue)
            assert self.cursor == event.get("noise_draws_before", self.cursor), (phase, i)
            indices = T - 1 - self.store.step_index[self.queue]
            assert indices.tolist() == [index for index, count in event["queue_steps_rle"] for _ in range(count)]
            self.run_event(event)
            if i in judged and phase == "process_1":
                self.judge(event)
        result["final_all"] = self.samples(saved)
        assert self.cursor == len(self.tape)
        return result

    def _pop(self, saved: list[int], count: int) -> None:
        saved += self.queue[:count]
        self.queue = self.queue[count:]


def relative_errors(ours: dict[str, torch.Tensor], golden: dict[str, torch.Tensor]) -> dict[str, float]:
    expected = {key: golden[key][0].transpose(0, 1) for key in ours if key in golden}
    assert "final_all" in expected
    return {key: float((ours[key] - t).abs().max() / t.abs().max()) for key, t in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_replay_of_the_release_reproduces_its_latents(name):
    golden = record_of(name)
    tensors = load_file(GOLDENS / "queue_vc2" / f"{name}.safetensors")
    clip, tape = (tensors[key][0].transpose(0, 1) for key in ("video_init", "noise_tape"))
    replay = ReleaseReplay(golden["cfg"], golden["events"], clip, tape, pseudo_network)
    judged = {score["iter"] for score in golden["reflection"]}
    errors = relative_errors(replay.replay(judged), tensors)
    assert max(errors.values()) <= 1e-5, errors
    ours = []
    for report in replay.reports:
        ours += report["scores"] if report["kind"] == "search_finished" else []
        ours += [report["score"]] if report["kind"] == "score" else []
    assert ours == pytest.approx([score["score"] for score in golden["reflection"]], abs=1e-5)


def test_released_preset_says_what_was_replayed():
    preset = PRESETS["videocrafter2-released"]
    miga, sampling = preset.miga, preset.sampling
    golden = record_of("official_reflect_early")
    config, events = golden["cfg"], golden["events"]
    last = config["T"] - 1  # DDIM index of pure noise
    first_index = {event["phase"]: event["queue_steps_rle"][0][0] for event in reversed(events)}
    assert (sampling.solver, sampling.eta, sampling.num_inference_steps) == ("ddim", 1.0, config["T"])
    assert (miga.zigzag_width, miga.guidance_frames, miga.stride) == (config["saw"], config["mem"], STRIDE)
    assert sampling.num_inference_steps - miga.stage2_steps == last - first_index["stage_2"]
    assert sampling.num_inference_steps - miga.refine_steps == last - first_index["renoise"]
    assert (miga.window_order, miga.self_reflection) == ("sequential", False)
    scores = golden["reflection"]
    trigger = next(score for score in scores if score["kind"] == "trigger" and score["flag"])
    assert [last - miga.judge_step] == trigger["judged_steps"]
    assert miga.reference_groups * miga.zigzag_width == trigger["n_new"]
    assert miga.score_drop == trigger["threshold"]
    searches = sum(score["kind"] == "trigger" and score["flag"] for score in scores)
    assert miga.candidates * searches == sum(score["kind"] == "candidate" for score in scores)


@pytest.mark.slow
@torch.no_grad()
def test_whole_line_with_a_network_equals_the_release():
    """From noise through the seed clip to refined latents and first pictures, with the goldens' UNet and VAE."""
    config = json.loads((GOLDENS / "e2e_vc2" / "e2e_small.json").read_text())["cfg"]
    tensors = load_file(GOLDENS / "e2e_vc2" / "e2e_small.safetensors")
    tape = tensors["noise_frames"][0].transpose(0, 1)
    unet = load_unet(GOLDENS / "vc2" / "unet.safetensors")
    texts = load_file(GOLDENS / "vc2" / "io.safetensors")
    contexts = unet.encode_context(torch.cat([texts["context2"], texts["context"]]))  # row 0 is unconditional

    def network(latents, timesteps, prompt_rows):
        return unet(latents, timesteps, contexts, context_index=prompt_rows)

    slots = np.arange(config["F"])
    store = FrameStore(config["F"], (4, *config["hw"]), CPU)
    noises = iter(tensors["base_noises"][:, 0].transpose(1, 2))
    schedule = make_schedule("ddim", config["T"], use_scale_array=True)
    denoiser = Denoiser(
        PlainNetwork(network), store, schedule, lambda *_, **__: next(noises), guidance_scale=config["cfg"]
    )
    store.put(slots, tensors["base_xT"][0].transpose(0, 1), step_index=0, numbers=slots.tolist())
    store.prompt_row[:] = 1
    for _ in range(config["T"]):
        denoiser.run([Window(slots, 0, config["F"])])

    replay = ReleaseReplay(config, release_events(config), store.sample, tape, network)
    results = replay.replay() | {"base_latent": store.sample}
    errors = relative_errors(results, tensors)
    assert errors.keys() == {"base_latent", "popped_stage1", "final_all"}
    assert max(errors.values()) <= 1e-5, errors
    pictures = load_vae(GOLDENS / "vc2" / "vae.safetensors").decode_frame(results["final_all"][:2])
    assert (pictures - tensors["video_first2"][0].transpose(0, 1)).abs().max() <= 1e-4
