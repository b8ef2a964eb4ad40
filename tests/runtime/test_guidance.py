"""Guidance rules against their papers' formulas in float64, and whole runs with each."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from small_run import NUM_FRAMES, OPTIONS, frames_of
from torch import Tensor

from miga_engine import ConfigError, Engine, ops
from miga_engine.request import Request
from miga_engine.runtime.denoise import Denoiser
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.guidance import APG_RMS, RULES, Guidance
from miga_engine.runtime.session import load_session
from miga_engine.schedule import COLUMNS, Schedule, make_schedule

SHAPE, STEPS = (3, 7, 9), [0, 1, 4, 5, 2]
SCHEDULES = {
    "flow": make_schedule("unipc", 6, 3.0),
    "epsilon": make_schedule("ddim", 6),
    "v": make_schedule("ddim", 6, prediction_type="v"),
    "scaled": make_schedule("ddim", 6, use_scale_array=True),
}
WITH_RULES = [{"guidance": "cfg-zero"}, {"guidance": "apg"}, {"guidance_scale_end": 1.5}]


def guided(rule: str, schedule: Schedule, step: int, scale: float, x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    """The output of one frame, as the rules' papers have it."""
    if rule == "cfg":
        return uncond + scale * (cond - uncond)
    if rule == "cfg-zero":
        if step == 0 and schedule.coefficients.prediction_type == "flow":
            return torch.zeros_like(cond)
        norm = (uncond * uncond).sum()
        s = (cond * uncond).sum() / norm if norm else norm
        return s * uncond + scale * (cond - s * uncond)
    row = dict(zip(COLUMNS, schedule.coefficients.rows64[step, 0].tolist(), strict=True))
    x0_cond, x0_uncond = (row["m_x"] * x + row["m_v"] * v for v in (cond, uncond))
    difference = x0_cond - x0_uncond
    norm = difference.norm()
    if norm:
        difference = difference * min(1.0, APG_RMS * x.numel() ** 0.5 / float(norm))
    along = x0_cond * ((difference * x0_cond).sum() / (x0_cond * x0_cond).sum())
    return (x0_cond + (scale - 1) * (difference - along) - row["m_x"] * x) / row["m_v"]


def scale_at(schedule: Schedule, step: int, first: float, last: float) -> float:
    sigmas = schedule.sigmas.tolist()
    share = (sigmas[step] - sigmas[-2]) / (sigmas[0] - sigmas[-2])
    return share * first + (1 - share) * last


def launch(op: str) -> Any:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    return importlib.import_module(f"miga_engine.kernels.{op}").launch


def updated(
    schedule: Schedule, rule: str, last: float | None, frames: list[Tensor], form: str, dtype: torch.dtype
) -> Tensor:
    """The velocity with which sampler_update moves each frame, read off a row whose x0 it is."""
    sample, cond, uncond = (tensor.to(dtype) for tensor in frames)
    slots, steps = torch.arange(len(STEPS)).flip(0), torch.tensor(STEPS)
    guidance = Guidance(schedule, torch.device("cpu"), rule, 5.0, last)
    with pytest.MonkeyPatch.context() as patch:
        if form == "eager":
            patch.setattr(ops, "guidance_dots", ops.guidance_dots_reference)
        elif form == "triton":
            patch.setattr(ops, "guidance_dots", launch("guidance_dots"))
        weights = guidance.weights(sample[slots], cond, uncond, slots=slots, step_index=steps)
    rows = torch.zeros(1, 3, len(COLUMNS), dtype=dtype)
    rows[..., COLUMNS.index("m_v")] = 1
    state, zero = [sample[slots].clone() for _ in range(4)], torch.zeros(len(STEPS), dtype=torch.int64)
    update = {"eager": ops.sampler_update_reference, "cpp": ops.sampler_update}.get(form)
    (update or launch("sampler_update"))(
        *state, cond, uncond, slots=slots, coefficients=rows, step_index=zero, history_length=zero,
        guidance_scale=guidance.scale, guidance_weights=weights,
    )  # fmt: skip
    return state[2][slots]


def random_frames() -> list[Tensor]:
    """x, v_c, v_u of frames in float64; of the second they are nearly alike, of the third v_u is 0, then both equal."""
    generator = torch.Generator().manual_seed(5)
    x, cond, other = torch.randn(3, len(STEPS), *SHAPE, generator=generator, dtype=torch.float64)
    uncond = 0.9 * cond + 0.3 * other
    uncond[1] = cond[1] + 1e-3 * other[1]
    uncond[2], uncond[3] = 0, cond[3]
    return [x, cond, uncond]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("last", [None, 1.5])
@pytest.mark.parametrize(("form", "dtype"), [("eager", torch.float64), ("eager", torch.float32),
                                             ("cpp", torch.float64), ("cpp", torch.float32),
                                             ("triton", torch.float32)])  # fmt: skip
def test_rules_are_their_formulas(name: str, rule: str, last: float | None, form: str, dtype: torch.dtype) -> None:
    schedule, frames = SCHEDULES[name], random_frames()
    received = updated(schedule, rule, last, frames, form, dtype)
    for i, step in enumerate(STEPS):
        scale = 5.0 if last is None else scale_at(schedule, step, 5.0, last)
        expected = guided(rule, schedule, step, scale, *(tensor[i] for tensor in frames))
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert (received[i].double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())), step


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_runs_from_the_first_step_to_the_last(rule: str) -> None:
    """At the ends exactly; a scale of 1 on the way is the conditional branch alone."""
    schedule, steps = SCHEDULES["epsilon"], torch.arange(6)
    x, cond, uncond = torch.randn(3, 6, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    down = Guidance(schedule, torch.device("cpu"), rule, 5.0, 1.0)
    assert down.is_on
    weights = down.weights(x, cond, uncond, slots=steps, step_index=steps)
    torch.testing.assert_close(weights[-1], torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    constant = Guidance(schedule, torch.device("cpu"), rule, 5.0, None)
    same = constant.weights(x, cond, uncond, slots=steps, step_index=steps)
    assert same is None if rule == "cfg" else torch.equal(weights[0], same[0])


@pytest.mark.parametrize("rule", RULES)
def test_without_guidance_there_is_one_branch(rule: str) -> None:
    store = FrameStore(4, SHAPE, torch.device("cpu"))
    for scale, last, num_branches in ((1.0, None, 1), (None, None, 1), (1.0, 1.0, 1), (5.0, None, 2), (1.0, 3.0, 2)):
        denoiser = Denoiser(None, store, SCHEDULES["flow"], None, guidance_scale=scale, guidance=rule,
                            guidance_scale_end=last)  # fmt: skip
        assert denoiser._outputs.shape[0] == num_branches


def test_choices_are_the_rules() -> None:
    option = next(field for field in dataclasses.fields(Request) if field.name == "guidance")
    assert option.metadata["choices"] == tuple(RULES)
    assert option.default == "cfg"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance": "cfg_zero"}, "guidance must be one of cfg, cfg-zero, apg, got 'cfg_zero'"),
        ({"guidance": None}, "guidance must be one of cfg, cfg-zero, apg, got None"),
        ({"guidance_scale_end": -1}, "guidance_scale_end must be a finite number of at least 0, got -1"),
        ({"guidance_scale_end": float("nan")}, "guidance_scale_end must be a finite number of at least 0, got nan"),
    ],
)
def test_refused_values_are_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        Engine.from_pretrained("tiny", "meta").resolve("a kite", num_frames=9, **options)


def test_records_without_rules_are_those_of_before() -> None:
    engine = Engine.from_pretrained("tiny", "meta")
    plain, ruled = (engine.resolve("a kite", num_frames=9, **options) for options in ({}, {"guidance": "apg"}))
    names = {"guidance", "guidance_scale_end"}
    assert not names & (set(plain.to_record()) | set(plain.metadata("tiny")))
    assert Request.from_record(plain.to_record()) == plain
    assert names & set(ruled.to_record()) == {"guidance"}
    assert Request.from_record(ruled.to_record()) == ruled


@pytest.mark.slow
@pytest.mark.parametrize("options", WITH_RULES, ids=["cfg-zero", "apg", "scale by level"])
def test_runs_with_a_rule_differ_reproduce_and_go_on(engine: Engine, whole: Tensor, tmp_path, options: dict) -> None:
    """Through seed clip, queue, searches and Stage 2; a saved run goes on by its rule, and no other."""
    path = tmp_path / "run.safetensors"
    ours = frames_of(engine.stream("a red balloon", NUM_FRAMES, **OPTIONS, **options))
    assert ours.shape == whole.shape
    assert not torch.equal(ours, whole)
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS, **options) as stream:
        parts = [next(stream).frames for _ in range(3)]
        stream.save(path)
    assert options.items() <= load_session(path).request.items()
    parts.append(frames_of(engine.resume(path)))
    assert torch.equal(torch.cat(parts), ours)


@pytest.mark.slow
def test_a_session_from_before_the_rules_goes_on_without_one(engine: Engine, whole: Tensor, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        first = next(stream).frames
        stream.save(path)
    assert "guidance" not in load_session(path).request
    assert torch.equal(torch.cat([first, frames_of(engine.resume(path))]), whole)


@pytest.mark.slow
def test_estimates_count_runs_with_a_rule() -> None:
    options = {"height": 64, "width": 96, "num_frames": 61}
    plain = Engine.estimate("tiny", "cpu", prompt="a kite", **options).device_total
    for more in WITH_RULES:
        assert abs(Engine.estimate("tiny", "cpu", prompt="a kite", **options, **more).device_total - plain) < 2**16
