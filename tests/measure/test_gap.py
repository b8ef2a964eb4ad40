"""The gap profile: against a network whose error is known by construction, and the command on clips of the world."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from miga_engine.cli.main import main
from miga_engine.config import MigaConfig
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.measure import gap
from miga_engine.resolve import schedule_of
from miga_engine.runtime.window_plan import plan_windows
from miga_engine.tiny import world
from miga_engine.video.outputs import open_sink

STEPS = 12
CONFIG = MigaConfig(zigzag_width=4, stage2_steps=3, guidance_frames=2, stride=6, self_reflection=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("tiny")


class _KnownError:
    """Of latents that are all zero the noise is what it sees over sigma: right but for an error by position."""

    def __init__(self, sigmas: torch.Tensor, errors: torch.Tensor) -> None:
        self.sigmas, self.errors = sigmas, errors

    def place_prompts(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def __call__(self, batch) -> torch.Tensor:
        sigma = self.sigmas[batch.steps][:, None, :, None, None]
        return batch.latents / sigma + self.errors[: batch.latents.shape[2]].view(1, 1, -1, 1, 1)


def _profile(engine, monkeypatch, errors, compared, num_clips=3):
    request = engine.resolve(prompt="x", num_inference_steps=STEPS, miga=CONFIG)
    sigmas = schedule_of(request).sigmas
    monkeypatch.setattr(gap, "_network", lambda *arguments: _KnownError(sigmas, errors))
    monkeypatch.setattr(gap, "_latents", lambda *arguments: torch.zeros(60, 16, 2, 2))
    clips = [gap.Clip(np.zeros((1, 16, 16, 3), np.uint8))] * num_clips
    return gap.gap_profile(engine, clips, compared, request, passes=6)


def test_an_error_that_is_the_same_everywhere_has_no_profile(engine, monkeypatch):
    bands, profiles = _profile(engine, monkeypatch, torch.ones(13), gap.patterns(CONFIG, 13))
    assert len(profiles) == 8
    for profile in profiles.values():
        known = np.array(profile.percent)[~np.isnan(profile.percent)]
        assert len(known) >= 4
        assert np.abs(known).max() < 1e-3
    assert [high >= low for high, low in bands] == [True] * len(bands)


@pytest.mark.parametrize(("end", "offset"), [("leading", 0), ("middle", 2), ("trailing", 5)])
def test_the_profile_is_the_error_at_the_positions_that_are_kept(engine, monkeypatch, end, offset):
    """An error that grows along the window, counted by hand over the six phases of a pass."""
    errors = torch.linspace(0.5, 1.5, 13)
    bands, profiles = _profile(engine, monkeypatch, errors, gap.patterns(CONFIG, 13))
    by_step: dict[int, list[float]] = {}
    for phase in range(6):
        for start, first, stop in plan_windows(36, 11, 6, phase, offset=offset):
            for frame in range(first, stop):
                position = frame - start + (2 if start >= 2 else 0)
                by_step.setdefault(8 - frame // 4, []).append(float(errors[position]) ** 2)
    sigmas = schedule_of(engine.resolve(prompt="x", num_inference_steps=STEPS, miga=CONFIG)).sigmas
    for (high, low), percent in zip(bands, profiles[f"guided, {end}"].percent, strict=True):
        levels = [np.mean(squares) for step, squares in by_step.items() if low <= sigmas[step] <= high]
        expected = 100 * (np.mean(levels) / float(errors.square().mean()) - 1) if levels else float("nan")
        assert percent == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_a_band_is_compared_at_the_levels_that_the_queue_has():
    """Ordinary windows know levels that the queue hands over before; they do not count."""
    ordinary = np.array([[1.0, 2.0, 4.0, 100.0]] * 3)
    own = np.array([[2.0, 2.0, 2.0, np.nan]] * 3)
    profile = gap._profile(own, ordinary, [(0, 2), (2, 4), (3, 4)], 1.0)
    assert profile.percent[:2] == pytest.approx((50.0, -50.0))
    assert np.isnan(profile.percent[2])
    assert profile.error[:2] == pytest.approx((0, 0))


def test_a_window_at_one_level_has_the_error_of_ordinary_windows(engine, monkeypatch):
    """A group as wide as the window, cut at its borders, is an ordinary window."""
    config = replace(CONFIG, zigzag_width=13, stride=13, guidance_frames=0, moving_phase=False)
    _, profiles = _profile(engine, monkeypatch, torch.linspace(0.5, 1.5, 13), {"whole": config})
    assert np.allclose([p for p in profiles["whole"].percent if not np.isnan(p)], 0, atol=1e-4)


def test_windows_that_go_through_the_network_are_counted(engine):
    config = replace(CONFIG, zigzag_width=13, stride=13, guidance_frames=0, moving_phase=False, stage2_steps=0)
    layout = gap.RunLayout(config, STEPS, 13, None)
    assert gap._num_windows(layout) == pytest.approx(STEPS / 13)


def test_clips_that_cannot_be_used_are_refused(engine, monkeypatch):
    request = engine.resolve(prompt="x", num_inference_steps=STEPS, miga=CONFIG)
    frames = np.zeros((49, 16, 16, 3), np.uint8)
    compared = {"guided, leading": CONFIG}
    with pytest.raises(ConfigError, match="a clip has 13 latent frames and a window of 'guided, leading' spans 17"):
        gap.gap_profile(engine, [gap.Clip(frames)] * 2, compared, request)
    with pytest.raises(ConfigError, match="there are 1 clips: give at least 2"):
        gap.gap_profile(engine, [gap.Clip(frames)], {}, request)
    with pytest.raises(ConfigError, match="a clip is 8×8 pixels: the model needs 16"):
        gap.gap_profile(engine, [gap.Clip(frames[:, :8, :8])] * 2, {}, request)


@pytest.mark.slow
def test_the_command_profiles_clips_with_their_captions(tmp_path, capsys):
    rng = np.random.default_rng(1)
    files = []
    for number in range(2):
        scene = world.sample_scene(rng)
        files.append(str(tmp_path / f"{number}.mkv"))
        with open_sink(files[-1], 12, 48, 32) as sink:
            sink.write(world.render(scene, 100, 81, 32, 48)[0])
        (tmp_path / f"{number}.txt").write_text(world.caption(scene))
    table, picture = tmp_path / "gap.json", tmp_path / "gap.png"
    options = ["--num-inference-steps", "6", "--stage2-steps", "2", "--no-self-reflection", "--passes", "1"]
    assert main(["eval", "gap", "--clips", *files, *options, "-o", str(table), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "guided, trailing" in shown
    assert "anchored, middle" in shown
    record = json.loads(table.read_text())
    assert list(record["patterns"]) == list(gap.patterns(CONFIG, 13))
    assert picture.stat().st_size > 1000
    assert main(["eval", "gap", "--clips", *files, *options]) == 0
    assert capsys.readouterr().out == shown  # the same noise again
    assert main(["eval", "gap", "--clips", files[0]]) == 2
    assert "--clips names one clip: give at least 2" in capsys.readouterr().err
