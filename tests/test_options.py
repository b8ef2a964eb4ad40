"""An option is one field of one record: signatures, flags, files, the C interface and the documents follow from it."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from dataclasses import dataclass
from typing import Any

import pytest
from places import ROOT

from miga_engine import ConfigError, Engine, calls, options
from miga_engine.cli.config_file import read_config
from miga_engine.cli.main import _build_parser
from miga_engine.cli.write_options import RECORDS
from miga_engine.config import MigaConfig, StreamOptions
from miga_engine.embed import HEADER
from miga_engine.fields import option
from miga_engine.integrations import embed
from miga_engine.presets import PRESETS
from miga_engine.request import Request

CALLS = {
    "from_pretrained": calls.LoadCall,
    "from_components": calls.ComponentsCall,
    "estimate": calls.EstimateCall,
    "resolve": Request,
    "stream": calls.StreamCall,
    "generate": calls.GenerateCall,
    "resume": calls.ResumeCall,
    "run": calls.RunCall,
}


@pytest.mark.parametrize("name", CALLS)
def test_signatures_name_every_option_and_no_other(name: str) -> None:
    method = getattr(Engine, name)
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("self", None)
    assert set(parameters) == {field.name for field in dataclasses.fields(CALLS[name])}
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for field in dataclasses.fields(CALLS[name]):
        assert parameters[field.name].default in (field.default, inspect.Parameter.empty)
        assert f"\n    {field.name}: {field.metadata['help'][:20]}" in method.__doc__


def test_options_of_no_name_and_without_a_prompt_are_refused_as_python_does() -> None:
    engine = Engine.from_pretrained("tiny", "meta")
    with pytest.raises(TypeError, match=r"Engine.generate\(\) got an unexpected keyword argument 'sede'"):
        engine.generate("a", sede=3)
    with pytest.raises(TypeError, match=r"Engine.stream\(\) missing 1 required positional argument: 'prompt'"):
        engine.stream()


def test_every_option_is_a_flag_a_key_of_a_file_and_one_of_the_c_interface(tmp_path) -> None:
    parser = next(a for a in _build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["generate"]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    file = tmp_path / "options.yaml"
    for record in RECORDS:
        for name in options.fields(record):
            assert "--" + name.replace("_", "-") in flags
            file.write_text(f"{name}:\n")
            read_config(str(file))
            if record in options.TITLES and record is not MigaConfig and name != "model":
                embed._parse(json.dumps({name: None}).encode(), embed._OF_MODEL | embed._OF_VIDEO)


def test_a_new_option_is_written_once(tmp_path, monkeypatch) -> None:
    """A field more, and nothing else: the signature, the flag, the file, the bounds, the form and the page have it."""

    @dataclass(frozen=True)
    class More(Request):
        grain: int = option(3, "film grain", least=1, most=9, unit="levels")

    assert "grain" in inspect.signature(options.takes(More)(lambda self, given: given)).parameters
    (shown,) = [entry for entry in options.form([More]) if entry.name == "grain"]
    assert (shown.group, shown.kind, shown.default, shown.least, shown.most) == ("output", "whole number", 3, 1, 9)
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    options.add_flags(parser, More)
    assert options.picked(vars(parser.parse_args(["--grain", "4"])), More) == {"grain": 4}
    file = tmp_path / "options.yaml"
    file.write_text("grain: 5\n")
    assert read_config(str(file), [More]) == {"grain": 5}
    with pytest.raises(ConfigError, match=r"grain must be a whole number of at least 1 \(levels\), got 0"):
        More("a", grain=0)
    with pytest.raises(ConfigError, match=r"grain must be at most 9 \(levels\), got 10"):
        More("a", grain=10)
    monkeypatch.setattr(options, "TITLES", {More: "video"})
    assert "| `grain` | whole number from 1 to 9 (levels) | 3 | film grain |" in options.markdown()


def test_documents_are_what_the_records_say() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == options.markdown(), "run `make options`"
    header = HEADER.read_text(encoding="utf-8")
    assert options.c_comment() in header, f"put this list into the header:\n{options.c_comment()}"


def test_records_resolve_to_what_session_files_hold() -> None:
    engine = Engine.from_pretrained("tiny", "meta")
    request = engine.resolve("a kite", num_frames=9, method="fifo", miga={"stride": 2}, fps=29.97)
    assert request.method is None
    assert (request.miga.stride, request.miga.commit, request.fps) == (2, "trailing", "2997/100")
    assert Request.from_record(json.loads(json.dumps(request.to_record()))) == request
    assert engine.resolve(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)}) == request
    for name in ("seed", "miga"):
        with pytest.raises(KeyError):
            Request.from_record({k: v for k, v in request.to_record().items() if k != name})


def test_every_preset_decides_everything() -> None:
    for preset in PRESETS.values():
        values = dataclasses.asdict(preset.sampling)
        assert {name for name, value in values.items() if value is None} <= {"sigmas", "denoising_steps"}


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 2), ({"guidance_scale": 4.5}, 4.5), ({"method": "fifo"}, 3), ({"miga": {"history_guidance": "off"}}, 3),
     ({"miga": {"history_guidance": "distant"}}, 3), ({"method": "fifo", "miga": {"history_guidance": "all"}}, 2)],
)  # fmt: skip
def test_the_scale_is_lower_by_default_where_all_history_is_guided_towards(
    options: dict[str, Any], scale: float
) -> None:
    assert Engine.from_pretrained("tiny", "meta").resolve("a kite", num_frames=9, **options).guidance_scale == scale


def test_streams_take_what_is_said_of_them() -> None:
    names = {field.name for field in dataclasses.fields(StreamOptions)}
    assert names < set(inspect.signature(Engine.generate).parameters)
