"""The C interface: built here, called from C++ as a program and as a plug-in, and from a process that has Python."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import golden_model
import places
import pytest
import torch

import miga_engine
from miga_engine import Engine
from miga_engine import embed as building
from miga_engine.config import fifo_config
from miga_engine.embed.__main__ import main as build_main
from miga_engine.errors import ConfigError, DriftError, MigaError, SessionError
from miga_engine.integrations import embed

SOURCES, HERE = building.SOURCES, building.HERE
NUM_FRAMES = 30
OPTIONS = {
    "num_frames": NUM_FRAMES,
    "prompt": "a red balloon",
    **golden_model.OPTIONS,
    "miga": dataclasses.asdict(golden_model.MIGA),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of libmiga_embed.so, example and checks."""
    folder = tmp_path_factory.mktemp("embed")
    try:
        building.find_python()
    except building.CannotEmbedError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-Werror")
        building.build(folder)
        checks = places.ROOT / "csrc" / "embed" / "checks.cpp"
        building.compile_cpp(checks, folder / "checks", "-ldl", "-pthread")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine.from_pretrained(folder)


@pytest.fixture(scope="module")
def frames(engine) -> list[torch.Tensor]:
    """By seed, the frames that Python's engine gives, uint8 [T, H, W, 3]."""
    options = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
    return [engine.generate("a red balloon", NUM_FRAMES, seed=seed, **options).frames for seed in (0, 1)]


@pytest.fixture
def run(folder):
    """Opens runs in this process and closes them."""
    opened = []

    def open_run(**options) -> embed.Run:
        opened.append(embed.open_run(os.fsencode(folder), json.dumps({**OPTIONS, **options}).encode()))
        return opened[-1]

    yield open_run
    for each in opened:
        each.close()


def _checksums(frames: torch.Tensor) -> list[str]:
    """FNV-1a of each frame, as the example prints it."""
    sums = []
    for frame in frames:
        value = 0xCBF29CE484222325
        for byte in frame.numpy().tobytes():
            value = (value ^ byte) * 0x100000001B3 % 2**64
        sums.append(f"{value:016x}")
    return sums


def _host(*command: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    # What would lead another Python astray must not matter to the one that the library hosts.
    surroundings = {**os.environ, "PYTHONHOME": "/absent", "PYTHONPATH": "/absent", **environment}
    result = subprocess.run(
        [*map(str, command)], env=surroundings, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == code, result.stderr
    return result


# From C++ --------------------------------------------------------------------------------------------------------


def test_header_is_plain_c(tmp_path):
    (tmp_path / "host.c").write_text('#include "miga_embed.h"\nint main(void) { return miga_abi() != MIGA_ABI; }\n')
    compiler = os.environ.get("CXX", "g++")
    flags = ["-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, tmp_path / "host.c"], check=True)


@pytest.mark.slow
def test_library_exports_the_header_and_nothing_else(built):
    table = _host("nm", "-D", "--defined-only", built / "libmiga_embed.so").stdout
    exported = {line.split()[-1] for line in table.splitlines() if line.split()[-2] in "TDBR"}
    assert exported == set(
        re.findall(r"^MIGA_API .*?(miga_\w+)\(", (SOURCES / "miga_embed.h").read_text(), re.MULTILINE)
    )


def test_the_folder_may_be_moved(built, tmp_path):
    for name in ("example", "libmiga_embed.so"):
        shutil.copy(built / name, tmp_path)
    result = _host(tmp_path / "example", "/absent", "{}", code=1)
    assert result.stderr.startswith("example: the options have no")
    assert "[libmiga_embed.so]" in _host("readelf", "-d", built / "example").stdout


def test_a_path_with_quotes_is_compiled_in(tmp_path):
    text = 'a "quoted" \\ folder'
    (tmp_path / "told.cpp").write_text("#include <cstdio>\nint main() { return std::puts(TOLD) < 0; }\n")
    building.compile_cpp(tmp_path / "told.cpp", tmp_path / "told", f"-DTOLD={building.c_string(text)}")
    assert _host(tmp_path / "told").stdout == f"{text}\n"


@pytest.mark.slow
def test_example_prints_the_checksums_of_python(built, folder, frames):
    result = _host(built / "example", folder, json.dumps(OPTIONS))
    expected = [f"{number} {checksum}" for number, checksum in enumerate(_checksums(frames[0]))]
    assert result.stdout.splitlines() == expected
    assert result.stderr == ""


@pytest.mark.slow
def test_example_cancels_saves_and_resumes_without_losing_a_frame(built, folder, frames, tmp_path):
    options = json.dumps({**OPTIONS, "overlap_decode": True})
    result = _host(built / "example", folder, options, 7, tmp_path / "run.safetensors")
    expected = [f"{number} {checksum}" for number, checksum in enumerate(_checksums(frames[0]))]
    assert result.stdout.splitlines() == expected
    assert (tmp_path / "run.safetensors").is_file()


@pytest.mark.slow
def test_a_host_can_rely_on_it(built, folder, frames, tmp_path):
    inside = json.dumps(OPTIONS)[1:-1]  # begins with num_frames, which an endless run leaves out
    result = _host(built / "checks", built / "libmiga_embed.so", folder, inside, tmp_path / "run.safetensors")
    assert result.stderr == ""
    found: dict[str, list[str]] = {}
    for line in result.stdout.splitlines():
        name, _, finding = line.partition(": ")
        found.setdefault(name, []).append(finding)

    expected = [_checksums(each) for each in frames]
    assert found["frame"] == found["seed 0"] == found["before"] + found["after"] == expected[0]
    assert found["seed 1"] == expected[1]
    assert 3 <= len(found["before"]) < NUM_FRAMES
    assert found["version"] == [miga_engine.__version__]
    assert found["info"] == [f"48 32 16 {NUM_FRAMES} 0"]
    sentences = {
        "no model": "model is missing",
        "absent model": "there is no model at '/absent/model': give",
        "no prompt": 'the options have no "prompt": describe',
        "bad JSON": "options are no JSON (Expecting value",
        "no UTF-8": "options are no JSON ('utf-8' codec",
        "unknown option": "unknown option 'sede'; the options are attention,",
        "absent session": "there is no session file at /absent/file.safetensors",
        "forged handle": "the handle is not open: use",
        "no handle": "the handle is not open: use",
        "no info": "info is missing: give",
        "no buffer": "frame is no buffer: give",
        "small buffer": "the buffer must hold 4608 bytes for a frame, got 4607",
        "short rows": "row_bytes must be 0 or at least 144 (3 × 48 pixels), got 143",
        "absent folder": "cannot write /absent/folder/run.safetensors",
        "closed handle": "the handle is not open: use",
    }
    for name, sentence in sentences.items():
        assert len(found[name]) == 1
        assert found[name][0].startswith(sentence)
    stream = Engine.from_pretrained(folder).stream(**{**OPTIONS, "miga": golden_model.MIGA})
    stream.set_prompt("a blue kite", above=0, blend=4)
    stream.set_prompt("green hills", 20)
    stream.set_guidance_scale(2.5)
    assert found["steered"] == _checksums(torch.cat([chunk.frames for chunk in stream])) != expected[0]
    assert set(found) == {*sentences, "frame", "seed 0", "seed 1", "before", "after", "steered", "version", "info"}


def test_the_renderer_of_the_examples_changes_its_prompt(built, tmp_path):
    program = tmp_path / "live"
    subprocess.run(
        ["cc", places.ROOT / "examples" / "live.c", f"-I{SOURCES}", f"-L{built}", "-lmiga_embed", f"-Wl,-rpath,{built}",
         "-Wall", "-Werror", "-o", program],
        check=True,
    )  # fmt: skip
    pulled = subprocess.run([program], cwd=tmp_path, capture_output=True, check=True).stdout
    replay = Engine.from_pretrained("tiny").replay(tmp_path / "live.session.safetensors")
    assert [change.frame > 12 for change in replay.request.changes] == [True]
    first = next(replay).frames  # the clip that it begins with
    assert pulled.startswith(first.numpy().tobytes())
    assert len(pulled) == 85 * 64 * 96 * 3


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("/absent/python", "there is no Python at /absent/python: set MIGA_PYTHON to the python 3"),
        ("/bin/sh", "miga_engine cannot be imported by /bin/sh "),
    ],
)
def test_another_environment_is_refused_by_name(built, folder, program, sentence):
    result = _host(built / "example", folder, json.dumps(OPTIONS), code=1, MIGA_PYTHON=program)
    assert result.stderr.startswith(f"example: {sentence}")
    assert len(result.stderr.splitlines()) == 1


# From a process that has Python ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loader", [ctypes.CDLL, ctypes.PyDLL], ids=["lock released", "lock held"])
def test_in_a_process_that_has_python(built, folder, frames, loader):
    library = loader(str(built / "libmiga_embed.so"))
    library.miga_open.restype = ctypes.c_void_p
    library.miga_last_error.restype = ctypes.c_char_p
    library.miga_next_frame.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    library.miga_close.argtypes = [ctypes.c_void_p]
    assert library.miga_open(b"/absent", b'{"prompt": "a"}') is None
    assert b"there is no model at '/absent'" in library.miga_last_error()
    handle = library.miga_open(os.fsencode(folder), json.dumps(OPTIONS).encode())
    assert handle, library.miga_last_error()
    pulled = torch.empty_like(frames[0])
    for frame in pulled:
        assert library.miga_next_frame(handle, frame.data_ptr(), frame.numel(), 0) == 1
    assert library.miga_next_frame(handle, pulled.data_ptr(), pulled[0].numel(), 0) == 0
    library.miga_close(handle)
    assert torch.equal(pulled, frames[0])


def test_build_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(building.sysconfig, "get_path", lambda name: "/absent/include")
    with pytest.raises(building.CannotEmbedError, match=r"/absent/include has no Python.h: install Python's headers"):
        building.find_python()
    monkeypatch.undo()
    monkeypatch.setattr(building.sys, "platform", "plan9")
    with pytest.raises(building.CannotEmbedError, match="built on Linux only, and this is plan9"):
        building.find_python()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("/absent/c++ -O1", r"there is no C\+\+ compiler /absent/c\+\+: install it, or name another one in CXX"),
        ("/bin/false", r"/bin/false failed on \S+miga_embed.cpp with exit code 1: read its words above"),
    ],
)
def test_a_compiler_that_fails_is_a_sentence(monkeypatch, tmp_path, capsys, compiler, sentence):
    monkeypatch.setenv("CXX", compiler)
    assert build_main(["--build-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert re.match(f"miga_engine: the C interface was not built: {sentence}", said.err)
    assert said.out == ""
    assert (tmp_path / "miga_embed.h").read_bytes() == building.HEADER.read_bytes()


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(building.CannotEmbedError, match="name another folder"):
        building.build(tmp_path / "file")


def test_an_installed_package_is_found_by_its_environment_alone(monkeypatch):
    root = building.package_folder()
    monkeypatch.setattr(building.site, "getsitepackages", lambda: [str(HERE.parents[1])])
    assert building.package_folder() == ""
    monkeypatch.setattr(building.site, "getsitepackages", lambda: ["/absent/site-packages"])
    assert building.package_folder() == str(HERE.parents[1])
    assert root in ("", str(HERE.parents[1]))


# What Python does for it -----------------------------------------------------------------------------------------


def _pull(run: embed.Run, most: int = 10**6) -> torch.Tensor:
    width, height, *_ = run.info()
    pulled = []
    while len(pulled) < most:
        frame = torch.zeros(height, width, 3, dtype=torch.uint8)
        if not run.next_frame(memoryview(frame.numpy()).cast("B")):
            break
        pulled.append(frame)
    return torch.stack(pulled) if pulled else torch.empty(0)


@pytest.mark.slow
def test_saved_runs_go_on_at_the_frame_and_can_be_made_longer(run, engine, tmp_path):
    path = os.fsencode(tmp_path / "run.safetensors")
    first = run(num_frames=60)
    head = _pull(first, 2)
    first.save(path)
    resumed = embed.resume_run(path, b'{"num_frames": 61}')
    assert resumed.info() == (48, 32, 16, 61, 2)
    longer = engine.generate("a red balloon", 61, miga=golden_model.MIGA, **golden_model.OPTIONS).frames
    assert torch.equal(torch.cat([head, _pull(resumed)]), longer)
    resumed.close()
    with pytest.raises(SessionError, match="the stream is closed and cannot be saved"):
        resumed.save(path)
    with pytest.raises(ConfigError, match="unknown option 'seed'"):
        embed.resume_run(path, b'{"seed": 1}')
    with pytest.raises(SessionError, match="was made with dtype 'float32'"):
        embed.resume_run(path, b'{"dtype": "bfloat16"}')


def test_a_model_that_the_host_has_not_named_is_not_opened(run, tmp_path, monkeypatch):
    path = os.fsencode(tmp_path / "run.safetensors")
    first = run(num_frames=60)
    first.save(path)
    monkeypatch.setattr(embed, "_named_models", set())
    with pytest.raises(ConfigError, match="which does not lie beside it: name the model with"):
        embed.resume_run(path, b"{}")


@pytest.mark.slow
def test_one_handle_in_two_threads_gives_every_frame_once(run, frames):
    shared = run()
    parts: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: parts.append(_pull(shared))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(_checksums(torch.cat(parts))) == sorted(_checksums(frames[0]))


@pytest.mark.slow
def test_an_error_of_the_run_ends_it_and_is_repeated(run):
    failing = run(stop_on_drift=0.0)
    frame = bytearray(48 * 32 * 3)
    with pytest.raises(DriftError) as raised:
        any(not failing.next_frame(frame) for _ in range(NUM_FRAMES + 1))
    for _ in range(2):
        with pytest.raises(MigaError, match=re.escape(f"the video ended with an error: {raised.value}")):
            failing.next_frame(frame)


@pytest.mark.slow
def test_timeline_and_method_are_those_of_the_engine(run, engine):
    timeline = {0: "a red balloon", 5: "snow at night"}
    config = dataclasses.replace(fifo_config(engine.preset.miga, 5), guidance_offset=2)
    expected = engine.generate(timeline, 12, miga=config, **golden_model.OPTIONS).frames
    prompt = {str(frame): text for frame, text in timeline.items()}
    pulled = _pull(run(prompt=prompt, num_frames=12, method="fifo", miga={"guidance_offset": 2}))
    assert torch.equal(pulled, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ('{"prompt": "a", "seed": 1, "seed": 2}', "'seed' is there twice"),
        ('["a"]', r"options must be a JSON object .*got \['a'\]"),
        ("[" * 100_000, "options are no JSON"),
        ('{"prompt": {"5": "late"}}', "give a text for frame 0, too"),
        ('{"prompt": {"0": "a", "first": "b"}}', "has the key 'first': give video frame numbers from 0 on"),
        ('{"prompt": {"0": "a", "007": "b"}}', "has the key '007': give video frame numbers from 0 on"),
        ('{"prompt": 7}', "prompt is of type int: give a text or a timeline"),
        ('{"prompt": "a", "seed": 1.5}', "seed must be a whole number .*got 1.5"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale must be a finite number"),
        ('{"prompt": "a", "preset": ["tiny"]}', "preset must be a text, got"),
        ('{"prompt": "a", "device": 0}', "device must be a text, got 0"),
        ('{"prompt": "a", "capture": "no"}', "capture must be true or false, got 'no'"),
        ('{"prompt": "a", "method": ["fifo"]}', "method must be 'miga' or 'fifo'"),
        ('{"prompt": "a", "miga": 7}', "miga must be an object of options of the method, got 7"),
        ('{"prompt": "a", "miga": {"saw_width": 7}}', "unknown option 'saw_width'"),
        ('{"prompt": "a", "ranks": 2}', "unknown option 'ranks'"),
        ('{"prompt": "a", "chunk_frames": 2}', "unknown option 'chunk_frames'"),
    ],
)
def test_options_that_cannot_be_used(folder, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        embed.open_run(os.fsencode(folder), options.encode())


def test_sentences():
    assert embed.sentence(ConfigError("seed must be\n 1")) == "seed must be 1"
    assert embed.sentence(ZeroDivisionError("division by zero")) == "ZeroDivisionError: division by zero"
