"""What a run asks of the network, as it is said before it begins, in the documents, and as it is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import toy_run
from places import ROOT

from miga_engine import Engine
from miga_engine.cli import main
from miga_engine.presets import PRESETS
from miga_engine.resolve import network_calls
from miga_engine.runtime.denoise import Denoiser
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.reflection import Reflection
from miga_engine.runtime.stages import VideoRun

LIST = (1000.0, 750.0, 500.0, 250.0)
TINY = {"stage2_steps": 1, "self_reflection": False}


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


def _cycle(run: VideoRun, count: Callable[[], tuple[int, int]]) -> tuple[float, float]:
    """Windows and frames read a latent frame over two cycles of phases, long after the beginning."""
    while run.stage != "stage1" or run.emitted < run.window_frames:
        run.tick()
    before, start = count(), run.emitted
    for _ in range(2 * run.stride):
        run.tick()
    made = run.emitted - start
    assert made == 2 * run.stride * run.config.zigzag_width
    return tuple((now - then) / made for now, then in zip(count(), before, strict=True))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("wan2.1", {}), ("wan2.1-4step", {}), ("wan2.1-8step", {}), ("tiny", {}), ("videocrafter2-fifo", {}),
     ("wan2.1", {"moving_phase": False, "refine_steps": 3}), ("tiny", {"zigzag_width": 4, "guidance_frames": 3})],
)  # fmt: skip
def test_a_long_run_reads_what_is_said_of_it(name: str, changes: dict[str, Any], monkeypatch) -> None:
    read = []

    def count(self: Denoiser, windows: Any, *, noise_series: int = 0, then: Callable[[], None] = lambda: None) -> None:
        for window in windows:
            read.append(len(window.slots))
            self.store.step_index[window.committed] += 1
        then()

    monkeypatch.setattr(Denoiser, "run", count)
    monkeypatch.setattr(Reflection, "after_pass", lambda self, head, tail, then: then())
    config = dataclasses.replace(PRESETS[name].miga, **changes)
    steps, window = PRESETS[name].sampling.num_inference_steps, {"w": 21, "t": 13, "v": 16}[name[0]]
    run = toy_run(config, None, steps=steps, window=window)
    assert _cycle(run, lambda: (len(read), sum(read))) == pytest.approx(run.layout.reading, rel=1e-12)


@pytest.mark.slow
def test_the_network_of_tiny_is_called_as_often_as_is_said(tiny: Engine) -> None:
    options: dict[str, Any] = {"denoising_steps": LIST, "guidance_scale": 1.0, "height": 32, "width": 48}
    request = tiny.resolve("a kite", num_frames=None, **options, miga={"zigzag_width": 3, **TINY})
    calls: list[tuple[int, int]] = []
    hook = tiny.bundle.transformer.register_forward_pre_hook(
        lambda module, given: calls.append((given[0].shape[0], given[0].shape[0] * given[0].shape[2]))
    )
    run = tiny.start(request)
    calls.clear()
    seen = _cycle(run, lambda: (sum(windows for windows, _ in calls), sum(frames for _, frames in calls)))
    hook.remove()
    assert seen == pytest.approx(run.layout.reading, rel=1e-12)
    assert f"{seen[0]:.2f} windows of up to 13 latent frames, {seen[1]:.1f} frames read, 1 branch" in network_calls(
        request, 13
    )


def _rows() -> Iterator[tuple[str, ...]]:
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("### Few steps\n")[2]
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    for line in section.splitlines():
        if line.startswith("| `wan2.1"):
            yield tuple(cell.strip() for cell in line.strip("|").split("|"))


def test_the_table_of_network_calls_is_that_of_the_presets() -> None:
    rows = list(_rows())
    assert [name for name, *_ in rows] == ["`wan2.1`", "`wan2.1-ours`", "`wan2.1-8step`", "`wan2.1-4step`"]
    base = None
    for name, steps, branches, windows, frames, fewer in rows:
        preset = PRESETS[name.strip("`")]
        sampling, layout = preset.sampling, RunLayout(preset.miga, preset.sampling.num_inference_steps, 21, None)
        both = 1 if sampling.guidance_scale == 1 else 2
        calls = both * layout.reading.frames
        base = base or calls
        assert (int(steps), int(branches)) == (sampling.num_inference_steps, both)
        assert (windows, frames) == (f"{layout.reading.windows:.2f}", f"{calls:.1f}")
        assert fewer == f"{base / calls:.1f}"


@pytest.mark.parametrize("name", ["wan2.1-4step", "wan2.1-8step"])
def test_a_window_of_the_presets_holds_all_levels_of_the_queue(name: str) -> None:
    preset = PRESETS[name]
    layout = RunLayout(preset.miga, preset.sampling.num_inference_steps, 21, None)
    (window,) = layout.queue_windows(0, preset.miga.zigzag_width * layout.handoff_step, 3)
    assert len(window.frames) == window.commit_stop == 21
    assert len(preset.sampling.denoising_steps) == preset.sampling.num_inference_steps
    dataclasses.replace(preset.miga, self_reflection=True).check(preset.sampling.num_inference_steps, 21)


@pytest.mark.slow
def test_the_command_says_what_it_will_ask_of_the_network(tmp_path: Path, capsys) -> None:
    few = ["generate", "a kite", "--denoising-steps", "1000,750,500,250", "--solver", "lcm", "--stage2-steps", "1",
           "--no-self-reflection", "--guidance-scale", "1", "--height", "32", "--width", "48", "--num-frames", "9",
           "-o", str(tmp_path / "a.mkv"), "--overwrite"]  # fmt: skip
    assert main(few) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"4 steps: for each latent frame \d\.\d\d windows of up to 13 latent frames, \d+\.\d frames "
                        r"read, 1 branch", line)  # fmt: skip
    assert main([*few, "--quiet"]) == 0
    assert "4 steps" not in capsys.readouterr().err


def test_a_line_says_where_searches_come_on_top(tiny: Engine) -> None:
    line = network_calls(tiny.resolve("a kite", num_frames=9), 13)
    assert line.startswith("24 steps: for each latent frame 4.83 windows of up to 13 latent frames, 62.8 frames read, ")
    assert line.endswith("2 branches; searches come on top")
