"""Videos that strangers wrote lead nowhere else, and are refused with one sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from refusals import refusal

from miga_engine.cli import main
from miga_engine.errors import SessionError
from miga_engine.runtime.session import load_session
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_metadata, read_video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_is_never_a_playlist(tmp_path: Path, suffix: str) -> None:
    """FFmpeg would follow what a playlist names, on the network too, whatever the file is called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for text in (f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n", f"ffconcat version 1.0\nfile {url}\n"):
            path = tmp_path / f"a{suffix}"
            path.write_text(text)
            for read in (read_metadata, read_video):
                assert "cannot read " in refusal(lambda read=read, path=path: read(path))
        with pytest.raises(TimeoutError):
            server.accept()
    for name in ("concat:a.mp4|b.mp4", "http://127.0.0.1:9/a.mp4", "x" * 300 + ".mp4", f"{tmp_path}/a.txt"):
        assert "cannot read " in refusal(lambda name=name: read_metadata(name))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_info_of_a_broken_video(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a{suffix}"
    with open_sink(path, 12, 32, 16, metadata={"prompt": "a"}) as sink:
        sink.write(torch.zeros(3, 16, 32, 3, dtype=torch.uint8))
    whole = path.read_bytes()
    for kept in (0, 10, 300, len(whole) // 2):
        path.write_bytes(whole[:kept])
        code = main(["info", str(path)])
        errors = capsys.readouterr().err
        assert (code, errors) == (0, "") or (code == 2 and errors.startswith("miga: ") and errors.count("\n") == 1)
    path.write_bytes(whole.replace(b'{"prompt": "a"}', b'{"\xff\xfe\xfdmpt": "a"}'))
    assert list(read_metadata(path).values()) == ["a"]
    path.write_bytes(whole.replace(b'{"prompt": "a"}', b"[[[[[[[[[[[[[[["))
    assert "carries no metadata of miga_engine" in refusal(lambda: read_metadata(path))


def test_a_video_in_no_format_that_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with open_sink(path, 12, 32, 16, metadata={"prompt": "a"}) as sink:
        sink.write(torch.zeros(3, 16, 32, 3, dtype=torch.uint8))
    assert b"avc1" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for read in (read_metadata, read_video):
        sentence = refusal(lambda read=read: read(path))
        assert "a.mp4: its video is in a format that FFmpeg does not know" in sentence


def test_info_obeys_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in a video's metadata do not reach the terminal, and pipes are not waited for."""
    path = tmp_path / "a.mkv"
    with open_sink(path, 12, 32, 16, metadata={"prompt": "\x1b[2Ja", "\x1b]0;b\a": "c\n"}) as sink:
        sink.write(torch.zeros(3, 16, 32, 3, dtype=torch.uint8))
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert r"\x1b[2Ja" in told
    assert r"\x1b]0;b\x07" in told
    assert told.replace("\n", "").isprintable()
    os.mkfifo(tmp_path / "b.safetensors")
    for name in (tmp_path / "b.safetensors", "x" * 5000, "x" * 5000 + ".mp4"):
        assert main(["info", str(name)]) == 2
    assert "is not a regular file" in refusal(lambda: load_session(tmp_path / "b.safetensors"), SessionError)
