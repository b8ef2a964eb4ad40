"""`MigaPipeline`: made of a live `WanPipeline` without a second copy, it gives the engine's frames."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import golden_model
import live_modules
import numpy as np
import pytest
import torch

from miga_engine import ConfigError, Engine, options
from miga_engine.config import MigaConfig
from miga_engine.fields import option
from miga_engine.integrations.diffusers import MigaPipeline, pipeline
from miga_engine.tiny import WEIGHTS_DIR

METHOD = dataclasses.asdict(golden_model.MIGA)
OPTIONS: dict[str, Any] = {**golden_model.OPTIONS, "num_frames": 21, **METHOD}
PROMPT = "a red balloon"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def live(folder: Path) -> Any:
    return _live(folder)


@pytest.fixture
def pipe(live: Any, folder: Path) -> MigaPipeline:
    pipe = MigaPipeline.from_pipe(live).configure(**live_modules.facts_of(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def frames(folder: Path) -> torch.Tensor:
    return _frames(folder, PROMPT, seed=3)


def _live(folder: Path) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(**live_modules.modules_of(folder), scheduler=scheduler)


def _frames(model: Path | str, prompt: str, **given: Any) -> torch.Tensor:
    chosen = {**golden_model.OPTIONS, "num_frames": 21, "miga": golden_model.MIGA}
    return Engine.from_pretrained(model, "cpu").generate(prompt, **{**chosen, **given}).frames


def test_a_live_pipeline_is_shared_and_gives_the_engines_frames(
    pipe: MigaPipeline, live: Any, frames: torch.Tensor
) -> None:
    (made,) = pipe(PROMPT, **OPTIONS, seed=3, output_type="uint8").frames
    assert torch.equal(made, frames)
    places = {
        tensor.untyped_storage().data_ptr()
        for part in (live.transformer, live.vae, live.text_encoder)
        for tensor in part.state_dict().values()
    }
    bundle = pipe.engine.bundle
    for network in (bundle.transformer, bundle.vae, bundle.text_encoder):
        assert {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()} <= places
    engine = pipe.engine
    assert pipe.engine is engine  # and not made for each call
    assert pipe.components["transformer"] is live.transformer


def test_the_embedded_model_in_a_pipeline() -> None:
    pipe = MigaPipeline.from_pipe(_live(WEIGHTS_DIR)).configure(**live_modules.facts_of(WEIGHTS_DIR), preset="tiny")
    pipe.set_progress_bar_config(disable=True)
    (made,) = pipe("a red balloon over snowy hills", num_frames=13, warmup="clip", output_type="uint8").frames
    engine = Engine.from_pretrained("tiny", "cpu")
    frames = engine.generate("a red balloon over snowy hills", num_frames=13, miga={"warmup": "clip"}).frames
    assert torch.equal(made, frames)


def test_forms_of_output_and_generators(pipe: MigaPipeline, frames: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    as_numpy = pipe(PROMPT, **OPTIONS, generator=generator).frames
    assert as_numpy.shape == (1, *frames.shape)
    assert np.array_equal((as_numpy[0] * 255).round().astype(np.uint8), frames.numpy())
    (again,) = pipe(PROMPT, **OPTIONS, generator=generator, return_dict=False, output_type="pt")[0]
    assert again.shape == (21, 3, 32, 48)
    assert not torch.equal((again * 255).round().byte().permute(0, 2, 3, 1), frames)  # the generator went on
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    pictures = pipe([PROMPT, "blue"], **OPTIONS, generator=generators, output_type="pil").frames
    assert [len(video) for video in pictures] == [21, 21]
    assert np.array_equal(np.asarray(pictures[0][-1]), frames[-1].numpy())


def test_embeddings_a_stream_and_replaced_modules(pipe: MigaPipeline, live: Any, frames: torch.Tensor) -> None:
    red, blurry = (live.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
                   for text in (PROMPT, "blurry"))  # fmt: skip
    without = MigaPipeline.from_pipe(live, text_encoder=None, tokenizer=None).configure(**pipe._engine_options)
    options = {**OPTIONS, "seed": 3}
    with without.stream(prompt_embeds=red, negative_prompt_embeds=blurry, **options) as stream:
        made = torch.cat([chunk.frames for chunk in stream])
    assert (made.float() - frames.float()).abs().max() <= 2  # its text encoder rounds in another order
    with pytest.raises(ConfigError, match="give negative_prompt_embeds, too, or guidance_scale=1"):
        without(prompt_embeds=red, **OPTIONS)
    engine = pipe.engine
    bias = live.transformer.proj_out.bias.detach()
    before = bias.clone()
    bias.add_(0.5)
    try:
        assert pipe.engine is engine  # what is written into the weights is the engine's, too
        assert not torch.equal(pipe(PROMPT, **OPTIONS, seed=3, output_type="uint8").frames[0], frames)
    finally:
        bias.copy_(before)
    pipe.transformer = live_modules.modules_of(WEIGHTS_DIR)["transformer"]
    assert pipe.engine is not engine


def test_callbacks_and_interruption(pipe: MigaPipeline) -> None:
    told: list[int] = []

    def callback(asked: MigaPipeline, done: int, _: None, data: dict[str, Any]) -> None:
        told.append(done)
        asked._interrupt = data["num_frames_out"] > 0

    (made,) = pipe(PROMPT, **OPTIONS | {"num_frames": 81}, output_type="uint8", callback_on_step_end=callback).frames
    assert told == sorted(told)
    assert 0 < len(made) < 81


def test_offloading_is_honoured_or_refused(pipe: MigaPipeline, live: Any, frames: torch.Tensor) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(PROMPT, **OPTIONS, seed=3, output_type="uint8").frames[0], frames)
    assert pipe._engine is not None
    assert not pipe._engine[1].is_loaded
    assert torch.equal(pipe(PROMPT, **OPTIONS, seed=3, output_type="uint8").frames[0], frames)
    with pytest.raises(ConfigError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    with pytest.raises(ConfigError, match="dtype would change the modules that both pipelines share"):
        MigaPipeline.from_pipe(live, dtype=torch.bfloat16)
    assert live.transformer.dtype == torch.float32


def test_what_is_out_of_place_is_said(
    pipe: MigaPipeline, live: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for given, sentence in (
        ({"output_type": "latent"}, "output_type must be one of np, pt, pil, uint8"),
        ({"num_videos_per_prompt": 2, "generator": [torch.Generator()]}, "there are 1 generators for 2 videos"),
        ({"prompt_embeds": torch.zeros(4, 32)}, "prompt and prompt_embeds are both given"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            pipe(PROMPT, **{**OPTIONS, **given})
    with pipe.stream(PROMPT, **golden_model.OPTIONS, miga=golden_model.MIGA, stride=3) as stream:
        assert stream.request.miga == dataclasses.replace(golden_model.MIGA, stride=3)
    with pytest.raises(TypeError, match="sede"):
        pipe(PROMPT, sede=3)
    with caplog.at_level(logging.WARNING, "miga_engine"):
        pipe(PROMPT, **OPTIONS | {"num_frames": 5})
    assert "the scheduler's flow_shift of 3 is not used" in caplog.text
    with pytest.raises(ConfigError, match=r"boundary_ratio is 0.9"):
        MigaPipeline.from_pipe(live, transformer_2=live.transformer, boundary_ratio=0.9)


def test_a_custom_pipeline_from_a_folder(tmp_path: Path, live: Any, folder: Path, frames: torch.Tensor) -> None:
    from diffusers import DiffusionPipeline

    live.save_pretrained(tmp_path / "wan")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "wan", custom_pipeline=str(Path(pipeline.__file__).parent), trust_remote_code=True
    )
    assert type(pipe).__name__ == "MigaPipeline"
    pipe.set_progress_bar_config(disable=True)
    pipe.configure(**live_modules.facts_of(folder))
    assert torch.equal(pipe(PROMPT, **OPTIONS, seed=3, output_type="uint8").frames[0], frames)


def test_a_new_option_of_the_method_is_one_of_the_pipeline(pipe: MigaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written here for it."""

    @dataclasses.dataclass(frozen=True)
    class More(MigaConfig):
        grain: int = option(3, "film grain", least=1, most=9)

    given: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "MigaConfig", More)
    monkeypatch.setattr(type(pipe.engine), "stream", lambda self, prompt, **options: given.update(options))
    pipe.stream(PROMPT, grain=5, zigzag_width=2, seed=4)
    assert given == {"miga": {"grain": 5, "zigzag_width": 2}, "seed": 4}
    assert "grain" in options.fields(More)
