"""An engine for other processes: the same frames of the same memory, whichever model it is."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import MODELS

from miga_engine import Engine
from miga_engine.errors import ConfigError, MigaError
from miga_engine.handover import SharedEngine, packed, unpacked
from miga_engine.models.bundle import ModelBundle

PROMPT = "a red balloon"


def _frames(engine: Engine, options: dict[str, Any], num_frames: int) -> torch.Tensor:
    return engine.generate(PROMPT, num_frames, **options).frames


def _tensors(found: ModelBundle) -> list[torch.Tensor]:
    parts = (found.transformer, found.vae, found.text_encoder)
    return [tensor for part in parts for tensor in part.state_dict().values()]


@pytest.mark.parametrize("family", MODELS)
def test_an_engine_that_is_handed_over_makes_the_same_frames_of_the_same_memory(tmp_path: Path, family: str) -> None:
    model = MODELS[family]
    engine = Engine.from_pretrained(model.build(tmp_path / "model"), "cpu")
    record, storages = packed(engine)
    for tensor in _tensors(engine.bundle):
        assert any(tensor.untyped_storage().data_ptr() == storage.ctypes.data for storage in storages)
    for storage in storages:
        storage.flags.writeable = False  # as a cluster's store gives them
    again = unpacked(record, storages)
    here, there = _tensors(again.bundle), _tensors(engine.bundle)
    assert [tensor.data_ptr() for tensor in here] == [tensor.data_ptr() for tensor in there]
    assert again.identity() == engine.identity()
    num_frames = min(13, model.num_frames - 1)
    assert torch.equal(_frames(again, model.options, num_frames), _frames(engine, model.options, num_frames))


def _in_a_process(shared: SharedEngine, answers: Any) -> None:
    torch.set_num_threads(1)
    model = MODELS["wan"]
    engine = shared.open()
    frames = _frames(engine, model.options, 9)
    mapped = sum("miga_engine" in line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd" in line)
    with torch.no_grad():  # of this process alone
        next(engine.bundle.transformer.parameters()).zero_()
    answers.put((frames.numpy(), mapped))


@pytest.mark.slow
def test_processes_that_are_spawned_share_one_memory(tmp_path: Path) -> None:
    model = MODELS["wan"]
    engine = Engine.from_pretrained(model.build(tmp_path / "model"), "cpu")
    expected = _frames(engine, model.options, 9).numpy()
    shared = SharedEngine(engine)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_in_a_process, args=(shared, answers))
    process.start()
    frames, mapped = answers.get(timeout=120)
    process.join()
    assert np.array_equal(frames, expected)
    assert mapped == 1
    opened = shared.open()  # nobody has written into it
    assert torch.equal(_frames(opened, model.options, 9), torch.from_numpy(expected))
    shared.close()


def test_an_engine_without_a_text_encoder_is_handed_over_as_it_is(tmp_path: Path) -> None:
    model = MODELS["wan"]
    whole = Engine.from_pretrained(model.build(tmp_path / "model"), "cpu")
    prompts = [PROMPT, whole.bundle.default_negative_prompt]
    embeddings = {prompt: whole.bundle.encode_prompts([prompt])[0] for prompt in prompts}
    engine = Engine.from_components(
        transformer=whole.bundle.transformer.state_dict(), vae=whole.bundle.vae.state_dict(), embeddings=embeddings,
        transformer_config={"num_heads": whole.bundle.transformer.config.num_heads}, window_frames=5,
        default_negative_prompt="blurry",
    )  # fmt: skip
    again = unpacked(*packed(engine))
    assert torch.equal(_frames(again, model.options, 9), _frames(engine, model.options, 9))
    sentences = []
    for one in (engine, again):
        with pytest.raises(MigaError) as caught:
            one.generate("another", 9, **model.options)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def test_an_engine_that_several_use_is_not_handed_over(tmp_path: Path) -> None:
    engine = Engine.from_pretrained(MODELS["wan"].build(tmp_path / "model"), "cpu")
    with pytest.raises(ConfigError, match="load it with device 'cpu'"):
        packed(engine.shared())
