"""Requests, configurations and models that cannot be are refused before any work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import golden_model
import pytest

from miga_engine import ConfigError, DeviceError, Engine
from miga_engine.config import MigaConfig, fifo_config, replace_options
from miga_engine.models.wan.variants import VARIANTS
from miga_engine.presets import PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": "  "}, "the prompt is empty at frame 0"),
        ({"prompt": {5: "late"}}, r"has frames \[5\]: give a text for frame 0, too"),
        ({"prompt": {0: "a", -1: "b"}}, "has the key -1: give video frame numbers from 0 on"),
        ({"prompt": 7}, "prompt is of type int: give a text or a timeline"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1 .*got 0"),
        ({"num_frames": 2.5}, "num_frames must be a whole number .*got 2.5"),
        ({"width": 100}, "width must be a multiple of 16 pixels, got 100; use 96 or 112"),
        ({"height": 8}, "height must be a multiple of 16 pixels, got 8; use 16"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "5"}, "guidance_scale must be a finite number .*got '5'"),
        ({"fps": 0}, "fps must be frames per second from 0.001 to 1000, as 24, 29.97 or 24000/1001, got 0"),
        ({"fps": "24/0"}, "fps must be frames per second .*got '24/0'"),
        ({"fps": float("nan")}, "fps must be frames per second .*got nan"),
        ({"fps": "1e999999999"}, "fps must be frames per second .*got '1e999999999'"),
        ({"fps": True}, "fps must be frames per second .*got True"),
        ({"num_inference_steps": 3}, "stage2_steps 3 leaves Stage 1 0 of 3 steps"),
        (
            {"miga": dataclasses.replace(golden_model.MIGA, judge_step=6)},
            "judge_step 6 with 2 reference_groups reaches",
        ),
        ({"solver": "heun"}, "solver 'heun' is unknown"),
        ({"solver": "ddim"}, "solver 'ddim' does not fit a model that predicts velocity"),
        ({"miga": MigaConfig(), "num_inference_steps": 54}, "zigzag_width 7 exceeds the model's window of 5"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(engine, options, sentence):
    arguments = {"prompt": "a red balloon", "num_frames": 30, "miga": golden_model.MIGA, **golden_model.OPTIONS}
    arguments |= options
    with pytest.raises(ConfigError, match=sentence):
        engine.stream(arguments.pop("prompt"), **arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"zigzag_width": 0}, "zigzag_width must be a whole number of at least 1, got 0"),
        ({"stride": -1}, "stride must be a whole number"),
        ({"judge": "eyes"}, "judge must be 'latent' or 'x0', got 'eyes'"),
        ({"saw_width": 7}, "unknown option 'saw_width'; the options are anchor_frames, candidates, "),
        ({"score_drop": "much"}, "score_drop must be a number, got 'much'"),
        ({"self_reflection": "yes"}, "self_reflection must be true or false, got 'yes'"),
    ],
)
def test_configuration_is_checked(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace_options(MigaConfig(), options)


WINDOWS = [("tiny", 13), ("videocrafter2", 16), ("wan2.1", 21), ("pusa", 21)]
WINDOWS += [(variant.default_preset, variant.window_frames) for variant in VARIANTS]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_consistent(name):
    preset = PRESETS[name]
    windows = {window for model, window in WINDOWS if name.startswith(model)}
    assert windows
    for window in windows:
        preset.miga.check(preset.sampling.num_inference_steps, window)
        fifo_config(preset.miga, window).check(preset.sampling.num_inference_steps, window)


def test_unavailable_device_and_unknown_names(folder):
    with pytest.raises(DeviceError, match="device 'xpu:7' is not available here"):
        Engine.from_pretrained(folder, "xpu:7")
    with pytest.raises(ConfigError, match="dtype must be one of float32"):
        Engine.from_pretrained(folder, dtype="int8")
    with pytest.raises(ConfigError, match=r"preset must be one of .*got 'wan9'"):
        Engine.from_pretrained(folder, preset="wan9")
