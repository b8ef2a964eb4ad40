"""The rival makes the engine's video, and the runs that are compared are timed in all their parts."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("own_results")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"num_frames": 21, "guidance_scale": 1.5}], ids=["long", "shorter than a clip"]
)
def test_diffusers_loop_makes_the_engines_latents_and_video(options: dict) -> None:
    import baseline_diffusers
    import engine_runs

    engine = engine_runs.load("cpu", "float32")
    loop = baseline_diffusers.DiffusersLoop(engine)
    request = engine_runs.small_request(engine, **options)
    ours, frames = baseline_diffusers.engine_latents(engine, request)
    theirs = loop.latents(request)
    assert frames.shape[0] == request.num_frames
    assert ours.shape[0] == theirs.shape[0] == engine.bundle.num_latent_frames(request.num_frames)
    assert (ours - theirs).abs().max() <= baseline_diffusers.TOLERANCE * theirs.abs().max()


@pytest.mark.slow
def test_check_refuses_another_video() -> None:
    import baseline_diffusers
    import engine_runs

    engine = engine_runs.load("cpu", "float32")
    loop = baseline_diffusers.DiffusersLoop(engine)
    request = engine_runs.small_request(engine, num_frames=21)
    assert baseline_diffusers.check(engine, loop, request) <= baseline_diffusers.TOLERANCE
    loop.transformer.proj_out.bias.add_(1e-3)
    with pytest.raises(AssertionError, match=r"latents of engine and diffusers loop differ by \d.*: not timed"):
        baseline_diffusers.check(engine, loop, request)


@pytest.mark.slow
def test_half_precision_is_held_to_the_float32_latents() -> None:
    import baseline_diffusers
    import engine_runs

    engine = engine_runs.load("cpu", "bfloat16")
    loop = baseline_diffusers.DiffusersLoop(engine)
    kept = {p.dtype for name, p in loop.transformer.named_parameters() if "norm2" in name or "scale_shift" in name}
    assert (loop.transformer.blocks[0].attn1.to_q.weight.dtype, kept) == (torch.bfloat16, {torch.float32})
    assert 0 < baseline_diffusers.check(engine, loop, engine_runs.small_request(engine, num_frames=21)) < 0.1


@pytest.mark.slow
def test_parts_of_a_run_add_up() -> None:
    import engine_runs

    engine = engine_runs.load("cpu", "float32")
    result = engine_runs.run_engine(engine, engine_runs.small_request(engine, num_frames=21))
    assert sum(result[part] for part in (*engine_runs.PARTS, "rest")) == pytest.approx(1)
    assert all(result[part] > 0 for part in ("network", "sampler", "decode", "rest"))
    assert result["network"] > 0.5
    assert 0 < result["first_frame_s"] <= result["seconds"]


def test_clock_of_captured_iterations_starts_when_every_shape_was_seen() -> None:
    import engine_runs

    graphs = SimpleNamespace(_seen=set(), _captured={})
    run = SimpleNamespace(stride=4, denoiser=SimpleNamespace(_graphs=graphs), ticks=0)

    def tick() -> None:
        shape = run.ticks % run.stride
        if shape in graphs._seen:
            graphs._captured[shape] = None
        graphs._seen.add(shape)
        run.ticks += 1

    run.tick = tick
    engine_runs.see_all_shapes(run)
    assert (run.ticks, engine_runs.captured_shapes(run)) == (3 * run.stride, 2 * run.stride)
    engine_runs.see_all_shapes(run)
    assert run.ticks == 4 * run.stride
    run.denoiser._graphs = None  # as of a run that captures nothing
    engine_runs.see_all_shapes(run)
    assert run.ticks == 4 * run.stride + 1


def test_requests_of_the_comparison_name_their_batch() -> None:
    import engine_runs

    engine = engine_runs.load("cpu", "float32")
    for request in (engine_runs.resolve(engine, 21), engine_runs.small_request(engine)):
        assert request.miga.window_batch == 1
    assert engine_runs.small_request(engine, window_batch=4).miga.window_batch == 4
