"""Options, configurations and prompts that strangers wrote: refused with one sentence, before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import passes_or_is_refused, quickly, refusal

from miga_engine.cli import main
from miga_engine.cli.config_file import read_config
from miga_engine.cli.settings import prompt_timeline, video_options
from miga_engine.engine import Engine
from miga_engine.errors import CheckpointError, ConfigError, OutputError
from miga_engine.prompts import MAX_PROMPT_CHARS
from miga_engine.video.outputs import open_sink
from miga_engine.video.paths import check_output


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nprompt: [*b, *b]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ALIASES, "has an alias at line 2: write the values out"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "has an alias at line 2"),
        ("seed: &s [*s]", "has an alias at line 1"),
        ("[" * 50_000, "has lists in lists in lists at line 1"),
        ("#" * (2**20 + 1), "is larger than 1 MiB"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("seed: 2001-99-99", "is not valid YAML"),
        ("seed: !!python/object/apply:os.system [touch ran]", "is not valid YAML at line 1"),
        ("a\0b", "is not valid YAML"),
        ("\udcff", "is not valid YAML"),
        ("- a", "must be a list of 'option: value' lines, got list"),
        ("model: [a]", "gives model as ['a']: give a text"),
        ("attention: {a: b}", "gives attention as {'a': 'b'}: give one of auto, triton"),
        ("quiet: 3", "gives quiet as 3: give true or false"),
        ("method: paint", "gives method as 'paint': give 'miga' or 'fifo'"),
        ("prompt_at: 0", "must give prompt_at as a list of [frame, prompt]"),
        ("prompt_at: [[.inf, x]]", "must give prompt_at as a list of [frame, prompt]"),
        ("prompt: 3", "prompt is empty at frame 0"),
        ("prompt: a\nheight: 1000000000", "height must be at most 16384 (pixels), got 1000000000"),
        ("prompt: a\nnum_frames: 1000000000000000000", "num_frames must be at most 1000000000 (video frames)"),
        ("prompt: a\nfps: 0", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nfps: 1000000000", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nfps: [24]", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nnum_inference_steps: 100000000", "num_inference_steps must be at most 1000 (steps)"),
        ("prompt: a\ncandidates: 1000000000", "candidates must be at most 10000"),
        ("prompt: a\nguidance_scale: 1" + "0" * 400, "guidance_scale must be a finite number"),
        ("prompt: a\nscore_drop: .inf", "score_drop must be a number, got inf"),
        ("prompt: a\nsolver: " + "x" * 9000, "solver 'xxx"),
        (
            "prompt: {0: a, 1000000000000: b}",
            "the prompt timeline reaches frame 1000000000000: give frames up to 1000000000",
        ),
    ],
)
def test_config_files(tiny: Engine, tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    def read() -> None:
        options = read_config(str(path))
        tiny.resolve(prompt_timeline(options), **video_options(options))

    assert sentence in refusal(read, ConfigError)
    assert not (tmp_path / "ran").exists()
    assert not Path("ran").exists()


@given(content=st.dictionaries(
    st.sampled_from(["prompt", "prompt_at", "seed", "model", "method", "num_frames", "fps", "shift", "solver", "judge",
                     "stride", "score_drop", "self_reflection", "negative_prompt", "quiet", "zoom",
                     "prompt_blend_frames"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 9) | st.text(max_size=2),
                 inner,
                                                                             max_size=2), max_leaves=5)))  # fmt: skip
@quickly
def test_any_config_file(tiny: Engine, tmp_path: Path, content: dict[str, Any]) -> None:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))

    def read() -> None:
        options = read_config(str(path))
        tiny.resolve(prompt_timeline(options), **video_options(options))

    passes_or_is_refused(read)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty at frame 0"),
        ("\t\n ", "the prompt is empty at frame 0"),
        ("x" * 100_000, f"the prompt at frame 0 has 100000 characters: shorten it to {MAX_PROMPT_CHARS}"),
        ("a\0b", r"the prompt at frame 0 holds '\x00', which is no character of a text: leave it out"),
        ("a\x1b[2J", r"holds '\x1b'"),
        ("a\ud800", r"holds '\ud800'"),
        (b"a", "prompt is of type bytes: give a text or a timeline {first_frame: text}"),
        ({0: "a", 3: "\ud800"}, "the prompt at frame 3 holds"),
        ({0: "a", "3": "b"}, "has the key '3': give video frame numbers from 0 on"),
        (dict.fromkeys(range(1001), "a"), "has 1001 entries: give at most 1000"),
    ],
)
def test_prompts(tiny: Engine, prompt: Any, sentence: str) -> None:
    assert sentence in refusal(lambda: tiny.resolve(prompt, num_frames=9), ConfigError)


@pytest.mark.parametrize("text", [None, 3, "a\0", "\ud800", "x" * 100_000])
def test_negative_prompts(tiny: Engine, text: Any) -> None:
    if text is None:
        assert tiny.resolve("a", num_frames=9, negative_prompt="").negative_prompt == ""
    else:
        refusal(lambda: tiny.resolve("a", num_frames=9, negative_prompt=text), ConfigError)


@given(text=st.text(st.characters(), min_size=1, max_size=60))
@quickly
def test_any_prompt(tiny: Engine, text: str) -> None:
    """What is taken can be encoded, and written into a video's metadata."""

    def encode() -> None:
        request = tiny.resolve(text, num_frames=9)
        json.dumps(request.metadata("tiny"), ensure_ascii=False).encode()
        assert tiny.bundle.encode_prompts([text]).isfinite().all()

    passes_or_is_refused(encode)


@pytest.mark.slow
def test_pictures_beyond_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "16384", "--width", "16384"]
    assert main(["generate", "a", "--device", "cpu", *size, "-o", str(tmp_path / "a.mkv")]) == 2
    told = capsys.readouterr().err
    assert re.search(r"^miga: the run would need \S+ GiB of memory and this machine has \S+ GiB: make the", told)


@pytest.mark.parametrize("name", ["x" * 5000 + ".mp4", "a\0.mp4", "missing/" * 1000 + "a.mp4"])
def test_output_names(tmp_path: Path, name: str) -> None:
    assert "cannot write " in refusal(lambda: check_output(f"{tmp_path}/{name}", (".mp4",)), OutputError)
    assert "cannot write " in refusal(lambda: open_sink(f"{tmp_path}/{name}", 12, 16, 16), OutputError)


def test_model_names() -> None:
    for name in ("x" * 5000, "a\0b", "\ud800"):
        with pytest.raises(CheckpointError, match="there is no model at"):
            Engine.from_pretrained(name)
