"""`miga --model owner/name`: out of the cache of Hugging Face's hub, and downloaded only where that is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import random_wan
import small_run
import torch
from peoples_files import EXTRA, generate, kill, told, write_lora
from places import ROOT
from safetensors.torch import load_file, save_file
from small_run import miga

from miga_engine.video.reading import read_video

NAME = "some-one/Wan2.1-T2V-small"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
LEFT_OUT = {"README.md", "LICENSE.txt", "assets/logo.png", "examples/girl.png"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a model as its makers publish it."""
    folder = random_wan.official(tmp_path_factory.mktemp("published") / "model")
    for name in ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"):
        torch.save(load_file(folder / f"{name}.safetensors"), folder / f"{name}.pth")
        (folder / f"{name}.safetensors").unlink()
    (folder / "miga.json").write_text(EXTRA)
    for name in LEFT_OUT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of no use to a run")
    return folder


@pytest.fixture(scope="module")
def whole(published: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    video = tmp_path_factory.mktemp("whole") / "whole.mkv"
    assert miga(*small_run.generate(published, video, 9)) == 0
    return read_video(video)


def _add_to_cache(cache: Path, files: Path, revision: str, commit: str) -> Path:
    """A snapshot as the library huggingface_hub lays it out: blobs, links to them, and which commit a name means."""
    root = cache / f"models--{NAME.replace('/', '--')}"
    for source in (path for path in files.rglob("*") if path.is_file()):
        link = root / "snapshots" / commit / source.relative_to(files)
        blob = root / "blobs" / f"{commit[:8]}{abs(hash(source)):x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(source, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture(scope="module")
def cache(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two revisions of the model."""
    folder = tmp_path_factory.mktemp("home") / "hub"
    _add_to_cache(folder, published, "main", COMMIT)
    second = shutil.copytree(published, tmp_path_factory.mktemp("second") / "model")
    save_file(random_wan.transformer(seed=1), second / random_wan.TRANSFORMER)
    _add_to_cache(folder, second, "second", OTHER)
    return folder


def _small(*more: object) -> list[object]:
    size = ["--height", 32, "--width", 48, "--zigzag-width", 2, "--guidance-frames", 1, "--stride", 2]
    return ["estimate", "--model", NAME, *size, *more]


# From the cache --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_the_cache_is_found_by_its_name_and_revision(cache, whole, tmp_path) -> None:
    videos = {}
    for revision in (None, "main", COMMIT, "second", OTHER):
        video = tmp_path / f"{revision}.mkv"
        more = [] if revision is None else ["--revision", revision]
        assert miga(*small_run.generate(NAME, video, 9, "--cache-dir", cache, *more)) == 0  # type: ignore[arg-type]
        videos[revision] = read_video(video)
    assert all(np.array_equal(videos[revision], whole) for revision in (None, "main", COMMIT))
    assert np.array_equal(videos["second"], videos[OTHER])
    assert not np.array_equal(videos["second"], whole)


@pytest.mark.slow
def test_its_video_goes_on_after_a_kill_with_its_lora_alone(cache, tmp_path, tmp_path_factory, capsys) -> None:
    style = f"{write_lora(tmp_path_factory.mktemp('loras') / 'style.safetensors', 0)}:0.7"
    whole, video, session = (tmp_path / name for name in ("whole.mkv", "video.mkv", "video.session.safetensors"))
    model = ["--cache-dir", cache, "--revision", "second"]
    assert miga(*generate(NAME, whole, *model, "--lora", style)) == 0
    kill(*generate(NAME, video, *model, "--lora", style))
    again = ["resume", session, "-q", "--model", NAME, *model]
    assert f"name the LoRA with --lora {style}" in told(capsys, 2, *again)
    assert miga(*again, "--lora", style) == 0
    assert np.array_equal(read_video(video), read_video(whole))


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_lies_where_the_environment_says(cache, variable) -> None:
    where = cache.parent if variable == "HF_HOME" else cache
    code, said = _run(*_small(), **{variable: str(where), "HF_HUB_OFFLINE": "1"})
    assert code == 0, said
    assert "total of the process" in said


@pytest.mark.slow
def test_a_video_of_a_model_of_the_hub_goes_on(cache, whole, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # where a name of the hub is not taken for a path beside the session file
    video, session = tmp_path / "video.mkv", tmp_path / "video.session.safetensors"
    arguments = small_run.generate(NAME, video, 5, "--cache-dir", cache, "--checkpoint-every", 4)  # type: ignore[arg-type]
    assert miga(*arguments) == 0
    assert f"session of           {NAME} (float32" in told(capsys, 0, "info", session)
    assert f"name the model with --model {NAME}" in told(capsys, 2, "resume", session, "-q", "--num-frames", 9)
    again = ["resume", session, "-q", "--num-frames", 9, "--model", NAME, "--cache-dir", cache]
    assert "other weights of the transformer" in told(capsys, 2, *again, "--revision", "second")
    assert miga(*again) == 0
    assert np.array_equal(read_video(video), whole)


def test_what_is_not_in_the_cache_is_told_with_the_command(tmp_path, capsys) -> None:
    said = told(capsys, 2, *_small("--cache-dir", tmp_path))
    assert said == (
        f"miga: there is no model at {NAME!r}, and none of this name in the cache of Hugging Face's hub: add "
        f"--download, or run: hf download {NAME} --cache-dir {tmp_path}\n"
    )
    said = told(capsys, 2, *_small("--cache-dir", tmp_path, "--revision", "a branch"))
    assert said.endswith(f"run: hf download {NAME} --revision 'a branch' --cache-dir {tmp_path}\n")
    assert "none of this name at revision a branch in the cache" in said
    assert list(tmp_path.iterdir()) == []


def test_a_part_in_the_cache_is_not_taken_for_the_model(published, tmp_path, capsys) -> None:
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(published / "config.json", part)
    _add_to_cache(tmp_path / "hub", part, "main", COMMIT)
    said = told(capsys, 2, *_small("--cache-dir", tmp_path / "hub"))
    assert "and only a part of this one in the cache of Hugging Face's hub: add --download, or run: hf downl" in said


def test_a_folder_of_such_a_name_goes_first(published, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(published)
    monkeypatch.chdir(tmp_path)
    told(capsys, 0, *_small())


def test_names_that_the_hub_does_not_have_are_one_sentence(tmp_path, capsys) -> None:
    for name in ("some-one/a--b", "some-one/a..b"):
        said = told(capsys, 2, "estimate", "--model", name, "--cache-dir", tmp_path)
        assert f"miga: {name} cannot be had from Hugging Face's hub (" in said
    for name in ("some/one/else", "~/model", "./model", "some-one/", "/some-one"):
        said = told(capsys, 2, "estimate", "--model", name)
        assert said.startswith(f"miga: there is no model at {name!r}: give 'tiny', a model folder")


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "miga_engine[download]"' in told(capsys, 2, *_small())


# Downloads -------------------------------------------------------------------------------------------------------


class _Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks to download a model, and remembers what that was."""

    daemon_threads = True

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = files
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path, and what was sent as authorization."""
        self.breaks_off = ""
        """A file in whose middle the connection ends."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        start = f"/{NAME}/resolve/{COMMIT}/"
        return {path.removeprefix(start) for method, path, _ in self.asked if method == "GET" and start in path}


class _Answers(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Authorization")))
        files = sorted(file for file in hub.files.rglob("*") if file.is_file())
        if path == f"/api/models/{NAME}/revision/main":
            names = [{"rfilename": file.relative_to(hub.files).as_posix()} for file in files]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": names}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": file.relative_to(hub.files).as_posix(), "size": file.stat().st_size,
                 "oid": f"{i:040x}"}
                for i, file in enumerate(files)
            ]  # fmt: skip
            self._answer(json.dumps(entries).encode())
        elif (file := hub.files / path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in files:
            self._answer(file.read_bytes(), f"{files.index(file):040x}", breaks_off=file.name == hub.breaks_off)
        else:
            code = "RevisionNotFound" if path.startswith(f"/api/models/{NAME}/") else "RepoNotFound"
            self._answer(b"{}", status=404, **{"X-Error-Code": code})

    def _answer(
        self, content: bytes, etag: str = "", *, status: int = 200, breaks_off: bool = False, **headers: str
    ) -> None:
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ("", 0))[1])
        self.send_response(206 if first else status)
        tag = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT} if etag else {}
        span = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
        for name, value in {"Content-Length": str(len(content) - first), **tag, **span, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : len(content) // 2 if breaks_off else None])
        self.close_connection = breaks_off

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def _serving(files: Path) -> Iterator[_Hub]:
    with _Hub(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(published: Path) -> Iterator[_Hub]:
    with _serving(published) as server:
        yield server


_SEVERAL = """
import json, sys
from miga_engine.cli import main
(code,) = {main(words) for words in json.loads(sys.argv[1])}
sys.exit(code)
"""


def _run(*arguments: object, **environment: str) -> tuple[int, str]:
    """The command, or `-c` and a program, in a process of its own, for the library reads its environment once; code,
    and all that it says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, *([] if arguments[0] == "-c" else ["-m", "miga_engine"]), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**kept, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_download_fetches_what_loading_reads_and_nothing_else(hub, published, whole, tmp_path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
    code, said = _run(*_small(), **environment)
    assert (code, hub.asked) == (2, [])  # without --download the network is not asked
    video = tmp_path / "video.mkv"
    code, said = _run(*small_run.generate(NAME, video, 9, "--download"), **environment)  # type: ignore[arg-type]
    assert code == 0, said
    assert np.array_equal(read_video(video), whole)
    files = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert hub.fetched() == files - LEFT_OUT
    assert {authorization for _, path, authorization in hub.asked if NAME in path} == {"Bearer hf_secret"}
    assert "hf_secret" not in said
    hub.asked.clear()
    code, said = _run(*_small(), **environment)
    assert (code, hub.asked) == (0, [])  # it is in the cache now


@pytest.mark.slow
@pytest.mark.parametrize(
    ("described", "content", "sentence"),
    [
        ("config.json", {"_class_name": "WanModel", "model_type": "i2v"}, "config.json belongs to a i2v model: give a"),
        ("high_noise_model/config.json", {"model_type": "i2v"}, "config.json belongs to a i2v model: give a Wan2.1"),
    ],
)
def test_a_model_of_no_use_is_not_downloaded(published, tmp_path, described, content, sentence) -> None:
    files = shutil.copytree(published, tmp_path / "files")
    (files / described).parent.mkdir(exist_ok=True)
    (files / described).write_text(json.dumps(content))
    with _serving(files) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        code, said = _run(*_small("--download"), **environment)
        assert code == 2
        assert sentence in said
        assert all(name.endswith(".json") for name in hub.fetched())


@pytest.mark.slow
def test_a_download_that_breaks_off_is_told_and_goes_on(hub, tmp_path, capsys) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    hub.breaks_off = random_wan.TRANSFORMER
    code, said = _run(*_small("--download"), **environment)
    assert code == 2
    assert f"miga: {NAME} did not come whole from Hugging Face's hub (peer closed connection" in said
    said = told(capsys, 2, *_small("--cache-dir", tmp_path / "home" / "hub"))
    assert "and only a part of this one in the cache of Hugging Face's hub: add --download" in said
    hub.breaks_off = ""
    code, said = _run(*_small("--download"), **environment)
    assert code == 0, said


@pytest.mark.slow
def test_what_cannot_be_downloaded_is_one_sentence(hub, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        home = {"HF_HOME": str(tmp_path / "home")}
        for environment, *asked in (
            ({"HF_ENDPOINT": nobody}, ([], "cannot be downloaded (")),
            ({"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}, ([], "HF_HUB_OFFLINE is not set")),
            (
                {"HF_ENDPOINT": hub.url},
                (["--revision", "gone"], "see to its name, its revision, and HF_TOKEN"),
                (["--model", "some-one/else"], "see to its name, its revision, and HF_TOKEN"),
            ),
        ):
            commands = [[str(word) for word in _small("--download", *more)] for more, _ in asked]
            code, said = _run("-c", _SEVERAL, json.dumps(commands), **environment, **home)
            assert code == 2
            lines = said.splitlines()
            assert len(lines) == len(asked), said
            for line, (_, expected) in zip(lines, asked, strict=True):
                assert line.startswith("miga: some-one/")
                assert expected in line
                assert line.isprintable()
