"""Few-step sampling: lists of levels, the solver that noises anew, and what a run of them is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_model
import pytest
import torch
from oracle import SHAPE, Oracle, collect, counter_noise, pseudo_network, toy_config, toy_run
from safetensors import safe_open

from miga_engine import ConfigError, Engine, ops
from miga_engine.cli import main
from miga_engine.cli.config_file import read_config
from miga_engine.config import MigaConfig
from miga_engine.integrations import embed
from miga_engine.noise import FrameNoise
from miga_engine.options import form
from miga_engine.request import Request
from miga_engine.runtime.stream import Event
from miga_engine.schedule import make_schedule

LIST = (1000.0, 750.0, 500.0, 250.0)
FEW = MigaConfig(zigzag_width=2, stage2_steps=1, guidance_frames=1, stride=2, self_reflection=False)
SIZES = {"height": 32, "width": 48, "seed": 3, "denoising_steps": LIST}
NUM_FRAMES = 45
TINY = {"stage2_steps": 1, "self_reflection": False}
SMALL = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.from_pretrained(golden_model.build(tmp_path_factory.mktemp("model")), "cpu")


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


# Trajectories ----------------------------------------------------------------------------------------------------

TRIG = (math.atan(80), 1.5, 1.4, 1.0)
RCM = tuple(math.sin(t) / (math.sin(t) + math.cos(t)) for t in TRIG)
WARPED = tuple(5 * u / (1 + 4 * u) for u in (1, 0.75, 0.5, 0.25))
CAUSVID_14B = (999, 934, 862, 756, 603, 410, 250, 140, 74)

RELEASES = {
    "LightX2V": ({"solver": "euler", "shift": 5.0, "denoising_steps": LIST}, WARPED),
    "LightX2V for flf2v": (
        {"solver": "euler", "shift": 16.0, "denoising_steps": LIST},
        tuple(16 * u / (1 + 15 * u) for u in (1, 0.75, 0.5, 0.25)),
    ),
    "Self-Forcing": ({"solver": "dmd", "shift": 5.0, "denoising_steps": LIST}, WARPED),
    "CausVid": ({"solver": "lcm", "shift": 1.0, "denoising_steps": "1000,757,522,0"}, (1, 0.757, 0.522)),
    "CausVid as a LoRA": (
        {"solver": "euler", "shift": 1.0, "denoising_steps": CAUSVID_14B},
        tuple(t / 1000 for t in CAUSVID_14B),
    ),
    "FastWan": ({"solver": "dmd", "shift": 1.0, "denoising_steps": [1000, 757, 522]}, (1, 0.757, 0.522)),
    "rCM": ({"solver": "lcm", "sigmas": RCM}, RCM),
}
"""By who gave the weights out: options, and the levels that their own samplers step through but for the last, 0."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RELEASES)
def test_each_release_is_stepped_as_its_own_sampler_does(name: str, dtype: torch.dtype) -> None:
    options, levels = RELEASES[name]
    schedule, sigmas = make_schedule(**options), (*levels, 0.0)
    assert schedule.sigmas.tolist() == pytest.approx(sigmas, abs=1e-7)
    assert schedule.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in levels], abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(sigmas), 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    x = noise[0] * sigmas[0]  # as rCM begins; the other lists begin at 1
    state = [x.to(dtype, copy=True), *(torch.full_like(x, torch.nan, dtype=dtype) for _ in range(3))]
    coefficients = schedule.coefficients.rows64 if dtype == torch.float64 else schedule.coefficients.rows
    is_euler = options["solver"] == "euler"
    assert schedule.uses_noise != is_euler
    for step, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        v, ours = torch.tanh(0.8 * x + 0.5 * sigma), torch.tanh(0.8 * state[0] + 0.5 * schedule.sigmas[step])
        x = x + (after - sigma) * v if is_euler else (1 - after) * (x - sigma * v) + after * noise[step + 1]
        at = torch.full((3,), step)
        ops.sampler_update(
            *state, ours, None, slots=torch.arange(3), coefficients=coefficients, step_index=at, history_length=at,
            guidance_scale=1.0, noise=None if is_euler else noise[step + 1].to(dtype),
        )  # fmt: skip
        assert (state[0] - x).abs().max() <= 1e-6 * max(1, float(x.abs().max()))


def test_every_row_of_lcm_is_a_prediction_and_fresh_noise_and_nothing_else() -> None:
    for schedule in (make_schedule("lcm", 12, 5.0), make_schedule("dmd", denoising_steps=LIST)):
        rows, after = schedule.coefficients.rows64, schedule.sigmas[1:].double()[:, None].expand(-1, 3)
        expected = torch.zeros_like(rows)
        expected[..., [0, 2]] = 1  # m_x, c_x
        expected[..., 1] = -schedule.sigmas[:-1].double()[:, None]  # m_v
        expected[..., 9], expected[..., 11] = 1 - after, after  # p_m, p_n
        assert torch.equal(rows, expected)
    assert torch.equal(make_schedule("lcm", 12, 5.0).timesteps, make_schedule("euler", 12, 5.0).timesteps)


# Forms of the update ---------------------------------------------------------------------------------------------

_update = ops.sampler_update


def _eager(*tensors: Any, noise: FrameNoise | None, **keywords: Any) -> None:
    ops.sampler_update_reference(*tensors, noise=_drawn(noise, tensors[0]), **keywords)


def _with_noise(*tensors: Any, noise: FrameNoise | None, **keywords: Any) -> None:
    _update(*tensors, noise=_drawn(noise, tensors[0]), **keywords)


def _triton(*tensors: Any, noise: FrameNoise | None, **keywords: Any) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from miga_engine.kernels import sampler_update

    counters = {} if noise is None else {"noise_counters": noise.counters, "noise_seed": noise.seed}
    sampler_update.launch(*tensors, **keywords, **counters)


def _drawn(noise: FrameNoise | None, state: torch.Tensor) -> torch.Tensor | None:
    return None if noise is None else noise.draw(tuple(state.shape[1:]))


FORMS = {"the oracle": _eager, "C++ that is given noise": _with_noise, "Triton": _triton}
"""Beside what a run takes by itself on a CPU: C++ that draws its noise."""


def _latents(engine: Engine, num_frames: int, **options: Any) -> torch.Tensor:
    return collect(engine.start(engine.resolve("a red kite", num_frames=num_frames, **options)))


def _tiny(tiny: Engine, **changes: Any) -> MigaConfig:
    return dataclasses.replace(tiny.preset.miga, **TINY, **changes)


@pytest.fixture(scope="module")
def by_solver(tiny: Engine) -> Callable[[str], torch.Tensor]:
    return functools.cache(
        lambda solver: _latents(tiny, 57, denoising_steps=LIST, solver=solver, miga=_tiny(tiny), **SMALL)
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["lcm", "euler"])
def test_four_forms_of_the_update_make_one_video_of_four_steps(tiny, by_solver, monkeypatch, form, solver) -> None:
    """Drawn noise may differ by one ulp in one value of 2²⁴; all else is the same to the last bit."""
    expected = by_solver(solver)
    monkeypatch.setattr(ops, "sampler_update", FORMS[form])
    received = _latents(tiny, 57, denoising_steps=LIST, solver=solver, miga=_tiny(tiny), **SMALL)
    assert (received - expected).abs().max() <= 1e-5
    assert solver == "lcm" or torch.equal(received, expected)


# Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "levels"), [
    ("lcm", {"denoising_steps": LIST}), ("lcm", {}), ("euler", {"denoising_steps": LIST}),
    ("unipc", {"sigmas": (1, 0.9, 0.7, 0.3)}), ("dpmpp_2m", {"sigmas": (1, 0.9, 0.7, 0.3)}),
])  # fmt: skip
@pytest.mark.parametrize("changes", [
    {}, {"refine_steps": 2}, {"stage2_steps": 0, "refine_steps": 1}, {"stage2_steps": 2, "zigzag_width": 1},
    {"past_context": True, "commit_offset": -1, "guidance_frames": 1, "zigzag_width": 1, "guidance_anchor": True,
     "history_guidance": "all"},
])  # fmt: skip
def test_streamed_equals_whole_sequence_at_few_steps(solver, levels, changes) -> None:
    config = toy_config(**{"stage2_steps": 1, **changes})
    schedule = make_schedule(solver, 4, 5.0, **levels)
    oracle = Oracle(pseudo_network, schedule, config, 9, counter_noise(5, SHAPE), 5.0)
    assert torch.equal(collect(toy_run(config, 30, schedule=schedule)), oracle.run(30))


@pytest.mark.slow
def test_noise_of_a_frame_and_level_is_its_own_however_windows_go_together() -> None:
    schedule, config = make_schedule("lcm", denoising_steps=LIST), toy_config(stage2_steps=1, refine_steps=1)
    whole, batched = (
        collect(toy_run(dataclasses.replace(config, window_batch=batch), 40, schedule=schedule)) for batch in (None, 4)
    )
    assert (whole - batched).abs().max() <= 2e-6
    assert not torch.equal(whole, collect(toy_run(config, 40, schedule=schedule, seed=6)))


class _Saved:
    """A run that is saved at each of its events, as a caller may."""

    def __init__(self, engine: Engine, folder: Path, **options: Any) -> None:
        self.paths: list[Path] = []
        self.folder = folder
        self.stream = engine.stream("a red balloon", NUM_FRAMES, on_event=self._save, **options)
        self.frames = torch.cat([chunk.frames for chunk in self.stream])

    def _save(self, event: Event) -> None:
        if event.kind in ("stage", "score", "search_started", "search_finished", "chunk"):
            self.paths.append(self.folder / f"{event.number}.safetensors")
            self.stream.save(self.paths[-1])


RUNS = {
    "lcm": {"solver": "lcm", "miga": FEW},
    "euler": {"solver": "euler", "miga": FEW},
    "lcm that searches and refines": {
        "solver": "dmd",
        "guidance_scale": 3.0,
        "miga": dataclasses.replace(
            FEW, self_reflection=True, judge_step=1, reference_groups=1, candidates=2, score_drop=0.0, refine_steps=1
        ),
    },
    "lcm from noise on, with a sink": {
        "solver": "lcm",
        "miga": dataclasses.replace(
            FEW,
            stage2_steps=0,
            guidance_frames=2,
            guidance_anchor=True,
            anchor_frames=2,
            stride=2,
            commit_offset=1,
            past_context=True,
            warmup="noise",
            reference_sigma=0.0,
            moving_phase=False,
        ),
    },
    "euler with a sink and groups two steps apart": {
        "solver": "euler",
        "miga": dataclasses.replace(
            FEW, stage2_steps=0, guidance_frames=2, guidance_anchor=True, anchor_frames=2, passes_per_advance=2
        ),
    },
    "euler behind its own clip": {"solver": "euler", "miga": dataclasses.replace(FEW, warmup="clip")},
    "euler as FIFO": {"solver": "euler", "method": "fifo", "denoising_steps": None, "num_inference_steps": 9},
    "lcm of evenly spaced levels": {"solver": "lcm", "denoising_steps": None, "num_inference_steps": 5, "miga": FEW},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_resumed_anywhere_ends_as_one_that_is_not(engine: Engine, tmp_path: Path, name: str) -> None:
    options = {**SIZES, "guidance_scale": 1.0, **RUNS[name]}
    whole = engine.generate("a red balloon", NUM_FRAMES, **options).frames
    saved = _Saved(engine, tmp_path, **options)
    assert torch.equal(saved.frames, whole)
    assert len(saved.paths) > 6
    for path in [*saved.paths[:3], *saved.paths[3 :: max(1, len(saved.paths) // 4)]]:
        resumed = engine.resume(path)
        assert resumed.request == saved.stream.request
        start = resumed.num_frames_out
        rest = [chunk.frames for chunk in resumed]
        assert torch.equal(torch.cat([whole[:start], *rest]), whole), path


# Options ---------------------------------------------------------------------------------------------------------


def test_a_session_file_and_metadata_record_the_lists_and_none_where_there_are_none(engine, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", 9, **SIZES, miga=FEW, solver="lcm") as stream:
        stream.save(path)
        assert json.loads(json.dumps(stream.request.metadata("small")))["denoising_steps"] == list(LIST)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])["request"]
    assert (record["denoising_steps"], record["num_inference_steps"]) == (list(LIST), 4)
    assert "sigmas" not in record
    assert Request.from_record(record).denoising_steps == LIST
    old = engine.resolve("a", num_frames=9, **golden_model.OPTIONS, miga=golden_model.MIGA)
    assert not {"sigmas", "denoising_steps"} & set(old.to_record())
    assert Request.from_record(json.loads(json.dumps(old.to_record()))) == old
    damaged = {**record, "denoising_steps": [250, 500]}
    with pytest.raises(ConfigError, match="denoising_steps must be up to 1000 numbers that descend, from at most 1000"):
        Request.from_record(damaged)


def test_a_list_says_how_many_steps_there_are(engine: Engine) -> None:
    def resolve(**options: Any) -> Request:
        return engine.resolve("a", num_frames=9, miga=FEW, height=32, width=48, **options)

    assert resolve(denoising_steps="1000,750 500, 250").num_inference_steps == 4
    assert resolve(sigmas=(1, 0.9, 0.5), num_inference_steps=3).sigmas == (1.0, 0.9, 0.5)
    again = resolve(denoising_steps=LIST)
    assert engine.resolve(**{f.name: getattr(again, f.name) for f in dataclasses.fields(again)}) == again
    with pytest.raises(ConfigError, match=r"^num_inference_steps is 5 and sigmas has 3 levels: leave num_inference"):
        resolve(sigmas=(1, 0.9, 0.5), num_inference_steps=5)
    with pytest.raises(ConfigError, match=r"^sigmas and denoising_steps are both given: keep one of the two$"):
        resolve(sigmas=(1, 0.9, 0.5), denoising_steps=LIST)
    with pytest.raises(ConfigError, match=r"^sigmas are given for solver 'ddim': they belong to flow models"):
        resolve(sigmas=(1, 0.9, 0.5), solver="ddim")
    with pytest.raises(ConfigError, match=r"^sigmas must be up to 1000 numbers .*, got 'one'$"):
        resolve(sigmas="one")


def test_the_list_of_a_preset_gives_way_to_what_is_asked_for() -> None:
    engine = Engine.from_pretrained("tiny", "meta", preset="wan2.1-4step")

    def resolve(**options: Any) -> Request:
        return engine.resolve("a", num_frames=9, height=64, width=96, miga={"zigzag_width": 4}, **options)

    assert (resolve().denoising_steps, resolve(num_inference_steps=4).denoising_steps) == (LIST, LIST)
    other = resolve(sigmas=(1, 0.9, 0.5))
    assert (other.sigmas, other.denoising_steps, other.num_inference_steps) == ((1.0, 0.9, 0.5), None, 3)
    more = resolve(num_inference_steps=6)
    assert (more.denoising_steps, more.num_inference_steps) == (None, 6)


@pytest.mark.parametrize("text", ["denoising_steps: [1000, 750, 500, 250]", "denoising_steps: 1000,750,500,250",
                                  "denoising_step_list: [1000, 750, 500, 250, 0]"])  # fmt: skip
def test_a_file_gives_a_list_or_a_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert Request("a", **read_config(str(path))).denoising_steps == LIST


@pytest.mark.parametrize("levels", [[1000, 750, 500, 250.0], "1000 750 500 250", "1000,750,500,250,0"])
def test_hosts_give_a_list_as_json_or_as_a_text(levels: Any) -> None:
    (shown,) = [option for option in form([Request]) if option.name == "denoising_steps"]
    assert (shown.kind, shown.group, shown.least, shown.most) == ("text", "sampling", None, None)
    asked = {"prompt": "a kite", "num_frames": 9, "height": 32, "width": 48, "solver": "dmd", "miga": TINY}
    run = embed.open_run(b"tiny", json.dumps({**asked, "denoising_steps": levels, "sigmas": None}).encode())
    assert run._stream.request.denoising_steps == LIST
    run.close()


def test_what_few_steps_cannot_have_is_one_sentence_that_names_every_change(tiny: Engine, capsys) -> None:
    few = ["generate", "a kite", "--model", "tiny", "--denoising-steps", "1000,750,500,250", "--solver", "lcm"]
    assert main([*few, "-o", "-"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "miga: stage2_steps 5 leaves Stage 1 -1 of 4 steps; use at most 2 and switch self_reflection off, whose "
        "judge_step 8 with 2 reference_groups takes 10 steps\n"
    )
    tiny.resolve("a", num_frames=9, denoising_steps=LIST, miga={"stage2_steps": 2, "self_reflection": False})
    with pytest.raises(ConfigError, match=r"^stage2_steps 20 leaves Stage 1 -2 of 18 steps; use at most 8$"):
        tiny.resolve("a", num_frames=9, num_inference_steps=18, miga={"stage2_steps": 20})
    tiny.resolve("a", num_frames=9, num_inference_steps=18, miga={"stage2_steps": 8})
    with pytest.raises(ConfigError, match=r"^num_inference_steps is 1, and a queue needs at least 2$"):
        tiny.resolve("a", num_frames=9, denoising_steps="1000")


def test_the_network_is_told_levels_that_are_no_whole_numbers() -> None:
    told = set()

    def network(latents: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        told.update(timesteps.flatten().tolist())
        return pseudo_network(latents, timesteps, rows)

    schedule = make_schedule("lcm", denoising_steps=LIST)
    config = toy_config(stage2_steps=1, guidance_anchor=True)
    collect(toy_run(config, 12, schedule=schedule, network=network))
    assert sorted(told) == pytest.approx([625, 2500 / 3, 937.5, 1000], abs=1e-4)


def test_the_transformer_embeds_a_timestep_as_it_is(tiny: Engine) -> None:
    transformer = tiny.bundle.transformer
    exact, near = (transformer.encode_timesteps(torch.tensor([t])).time for t in (937.5, 937.0))
    assert torch.equal(exact, transformer.encode_timesteps(torch.tensor([937.5], dtype=torch.float64)).time)
    assert not torch.equal(exact, near)
