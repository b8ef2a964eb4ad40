"""`miga serve`: frames are those of the engine, and no request does what it may not."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import METHOD, OPTIONS, SECONDS, VIDEO, Client, first_frames, serving, written
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from miga_engine import Engine
from miga_engine.cli import main
from miga_engine.errors import ConfigError, MigaError
from miga_engine.integrations.server import asked
from miga_engine.integrations.server.asked import FILES, asked_of
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.options import fields
from miga_engine.request import Request
from miga_engine.runtime.session import load_session
from miga_engine.video.png import encode_png
from miga_engine.video.reading import read_metadata, read_video

# A job ---------------------------------------------------------------------------------------------------------------


def test_a_jobs_frames_are_those_of_the_engine(client: Client, shown: np.ndarray, tmp_path: Path) -> None:
    answer = client.post("/v1/videos", VIDEO)
    name = answer.json["id"]
    assert re.fullmatch("video_[0-9a-f]{24}", name)
    expected = {"object": "video", "model": "small-wan", "prompt": "a red balloon", "size": "48x32", "seconds": "5",
                "seed": 0, "error": None, "progress": 0}  # fmt: skip
    assert {key: answer.json[key] for key in expected} == expected
    assert np.array_equal(client.frames(name, tmp_path), shown)  # asked for before the first one is there
    job = client.ended(name)
    assert (job["progress"], job["num_frames_out"]) == (100, 30)
    assert job["created_at"] <= job["started_at"] <= job["completed_at"] <= time.time()
    metadata = read_metadata(tmp_path / f"{name}.mp4")
    assert (metadata["model"], metadata["prompt"], metadata["seed"]) == ("small-wan", "a red balloon", 0)
    (tmp_path / "session.safetensors").write_bytes(client.get(f"/v1/videos/{name}/session").body)
    assert load_session(tmp_path / "session.safetensors").state.numbers["num_frames_out"] == 30


def test_a_finished_video_is_given_in_parts(client: Client) -> None:
    name = client.start()
    client.ended(name)
    whole = client.get(f"/v1/videos/{name}/content")
    assert (whole.status, whole.headers["content-type"]) == (200, "video/mp4")
    assert int(whole.headers["content-length"]) == len(whole.body) > 1000
    part = client.get(f"/v1/videos/{name}/content", range="bytes=100-199")
    assert (part.status, part.body) == (206, whole.body[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.body)}"
    assert client.get(f"/v1/videos/{name}/content", range=f"bytes={len(whole.body)}-").status == 416
    head = client.send("HEAD", f"/v1/videos/{name}/content")
    assert (head.body, head.headers["content-length"]) == (b"", whole.headers["content-length"])


def test_a_video_is_read_while_it_is_made(engine: Engine, tmp_path: Path) -> None:
    """An endless one: its bytes come while it goes on, and are those of the file that it leaves."""
    with serving(engine, tmp_path / "jobs") as client:
        name = client.start(num_frames=None)
        with contextlib.closing(client.connect()) as connection:
            connection.request("GET", f"/v1/videos/{name}/content")
            answer = connection.getresponse()
            assert answer.getheader("transfer-encoding") == "chunked"
            assert answer.getheader("content-length") is None
            data = b""
            while data.count(b"moof") < 3:  # three seconds of it
                data += answer.read1(2**16)
            assert client.send("HEAD", f"/v1/videos/{name}/content").headers["content-type"] == "video/mp4"
            assert client.send("HEAD", f"/v1/videos/{name}/events").body == b""
            job = client.job(name)
            assert (job["status"], job["progress"], job["num_frames"]) == ("in_progress", 0, None)
            assert job["seconds_to_first_frame"] > 0
            assert client.post(f"/v1/videos/{name}/cancel").status == 200
            data += answer.read()
        job = client.ended(name, "cancelled")
        assert client.get(f"/v1/videos/{name}/content").body == data
        (tmp_path / "read.mp4").write_bytes(data)
        made = read_video(tmp_path / "read.mp4")
        assert len(made) == job["num_frames_out"] > 18
        count = min(len(made), 30) // 6 * 6  # whole seconds, each encoded by itself
        assert np.array_equal(made[:count], written(first_frames(engine, count), tmp_path / "shown.mp4"))

        assert client.post(f"/v1/videos/{name}/resume").status == 200
        client.begun(name, job["num_frames_out"] + 6)
        assert client.send("DELETE", f"/v1/videos/{name}").json["deleted"]
        assert client.get(f"/v1/videos/{name}").status == 404
        until = time.monotonic() + SECONDS
        while [path.name for path in (tmp_path / "jobs").iterdir()] != [".lock"]:  # once its pass is finished
            assert time.monotonic() < until
            time.sleep(0.02)


def test_names_of_others_are_understood(engine: Engine) -> None:
    limits, small = ServeOptions(), {"size": "48x32", "num_inference_steps": 8, **METHOD}
    given = asked_of({"prompt": {"0": "a", "160": "b"}, "seconds": "4", "user": "me", "video_params": {"fps": 24},
                      "flow_shift": 2.5, "extra_body": {"tail_signal": 0.5}, "seed": 2**64 - 1, "model": "small-wan",
                      **small}, engine, limits)  # fmt: skip
    assert (given.prompt, given.width, given.height, given.fps) == ({0: "a", 160: "b"}, 48, 32, "24")
    assert (given.num_frames, given.seed) == (96, 2**64 - 1)
    assert given.options["miga"] == {**METHOD, "tail_signal": 0.5}
    assert given.options["shift"] == 2.5
    assert asked_of({"prompt": "a", **small}, engine, limits).num_frames == 240
    assert asked_of({"prompt": "a", "num_frames": None, **small}, engine, limits).num_frames is None


def test_a_form_brings_a_picture_to_begin_with(client: Client, engine: Engine, tmp_path: Path) -> None:
    picture = np.full((32, 48, 3), 200, np.uint8)
    picture[:16] = 30
    form = {"seed": "0"} | {name: json.dumps(value) if name == "miga" else str(value) for name, value in VIDEO.items()}
    answer = _posted(client, form | {"num_frames": "13"}, encode_png(picture))
    assert answer.status == 200, answer.body
    made = client.frames(answer.json["id"], tmp_path)
    again = client.post(f"/v1/videos/{answer.json['id']}/replay").json["id"]
    assert np.array_equal(client.frames(again, tmp_path), made)
    video = engine.generate("a red balloon", 13, image=picture, **OPTIONS)
    assert np.array_equal(made, written(video.frames, tmp_path / "shown.mp4"))
    for data, status, sentence in (
        (b"GIF89a", 415, "input_reference is no PNG and no JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, 400, "input"),
    ):
        answer = _posted(client, form, data)
        assert answer.status == status
        assert sentence in answer.refusal
    assert "send a picture as input_reference" in _posted(client, form, b"", "lora").refusal
    for name, text, sentence in (
        ("quality", "standard", "unknown field 'quality'"),
        ("seed", "many", "seed must be a whole number from 0"),
        ("num_frames", "NaN", "num_frames must be a whole number"),
        ("miga", "{", "miga is '{': give an object of options"),
        ("prompt", '{"0": "a"', "is no JSON"),
    ):
        answer = _posted(client, {**form, name: text}, None)
        assert (answer.status in (400, 422), sentence in answer.refusal) == (True, True), answer.body
    twice, header = _form(form, None)
    assert "'prompt' is there twice" in client.post("/v1/videos", twice.replace(b"seed", b"prompt"), **header).refusal


def _posted(client: Client, *form: Any) -> Any:
    body, header = _form(*form)
    return client.post("/v1/videos", body, **header)


def _form(texts: dict[str, str], picture: bytes | None, name: str = "input_reference") -> tuple[bytes, Any]:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
             for key, value in texts.items()]  # fmt: skip
    if picture is not None:
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="../../x"\r\n\r\n'
        parts.append(head.encode() + picture + b"\r\n")
    return b"".join(parts) + b"--b--\r\n", {"content-type": "multipart/form-data; boundary=b"}


def test_jobs_are_listed_page_by_page(client: Client) -> None:
    names = [client.start(num_frames=99_999, prompt=f"kite {i}") for i in range(3)]
    try:
        page = client.get("/v1/videos?limit=2").json
        assert [job["id"] for job in page["data"]] == names[:0:-1]
        assert (page["first_id"], page["last_id"], page["has_more"]) == (names[2], names[1], True)
        rest = client.get(f"/v1/videos?after={names[1]}&limit=1").json
        assert rest["data"][0]["id"] == names[0]
        assert [job["id"] for job in client.get("/v1/videos?order=asc&limit=100").json["data"]][-3:] == names
        for query in ("limit=0", "limit=x", "order=up", "after=video_000000000000000000000000"):
            assert client.get(f"/v1/videos?{query}").status in (400, 404)
    finally:
        for name in names:
            assert client.send("DELETE", f"/v1/videos/{name}").status == 200
    assert client.get(f"/v1/videos/{names[0]}").status == 404


def test_models_and_options_are_those_of_the_engine(client: Client) -> None:
    (listed,) = client.get("/v1/models").json["data"]
    assert (listed["id"], listed["object"], listed["max_frames"]) == ("small-wan", "model", 100_000)
    names = {option["name"] for option in client.get("/v1/options").json["data"]}
    assert set(fields(Request)) - set(FILES) < names
    assert names.isdisjoint({"lora", "image", "device", "output"})


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"sede": 3}, 422, "unknown field 'sede'; the fields are"),
        ({"miga": {"zigzag_widht": 3}}, 422, "unknown field 'zigzag_widht'"),
        ({"image": "/etc/passwd"}, 400, "image is not taken from a request"),
        ({"extra_body": {"lora": "x.safetensors"}}, 400, "lora is not taken from a request"),
        ({"output_path": "/tmp/x"}, 400, "output_path is not taken from a request"),
        ({"image_reference": {"image_url": "http://a"}}, 400, "image_reference is not taken"),
        ({"device": "cpu"}, 400, "device is not taken from a request"),
        ({"model": "sora-2"}, 404, "model is 'sora-2', and this server has small-wan"),
        ({"prompt": None}, 400, 'the request has no "prompt"'),
        ({"prompt": " "}, 400, "the prompt is empty at frame 0"),
        ({"prompt": ["a"]}, 400, "prompt is ['a']: give a text, or a timeline"),
        ({"prompt": {"-1": "a"}}, 400, "the prompt timeline has the key '-1'"),
        ({"prompt": {"8": "a"}}, 400, "give a text for frame 0"),
        ({"prompt": "a\x00b"}, 400, "holds '\\x00', which is no character of a text"),
        ({"prompt": "a\ud800"}, 400, "which is no character of a text"),
        ({"prompt": "a" * 10_001}, 400, "has 10001 characters"),
        ({"seed": -1}, 400, "seed must be a whole number from 0 to 2^64 − 1"),
        ({"seed": 10**400}, 400, "seed must be at most"),
        ({"seed": True}, 400, "seed must be a whole number"),
        ({"guidance_scale": 10**400}, 400, "guidance_scale must be a finite number"),
        ({"size": "48 x 32"}, 400, "size is '48 x 32': give a text"),
        ({"size": "47x32"}, 400, "width must be a multiple of 16 pixels, got 47"),
        ({"size": "4800x3200"}, 400, "at most 921600 pixels"),
        ({"width": 64}, 400, "width is given twice, once by size"),
        ({"num_frames": 100_001}, 400, "this server makes at most 100000"),
        ({"num_frames": None, "miga": {}}, 400, "this server makes no endless videos"),
        ({"seconds": "4"}, 400, "seconds and num_frames are both given"),
        ({"fps": "1/0"}, 400, "fps"),
        ({"fps": "a" * 5000}, 400, "fps"),
        ({"guidance": "all"}, 400, "guidance is 'all': give one of cfg"),
        ({"miga": {**METHOD, "zigzag_width": 10_000}}, 400, "zigzag_width 10000 exceeds the model's window"),
        ({"miga": [1]}, 400, "miga is [1]: give an object of options"),
        ({"num_inference_steps": 1001}, 400, "num_inference_steps must be at most 1000"),
        ({"warn_on_drift": "x"}, 400, "warn_on_drift must be a finite number"),
        ({"sigmas": ["a"]}, 400, "sigmas must be up to 1000 numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(engine: Engine, change: Any, status: int, sentence: str) -> None:
    with pytest.raises(MigaError) as raised:
        asked_of({**VIDEO, **change}, engine, ServeOptions(max_frames=100_000))
    assert getattr(raised.value, "status", 400) == status
    assert sentence in str(raised.value)


def test_a_video_that_takes_more_memory_than_there_is_is_refused(engine: Engine, monkeypatch) -> None:
    monkeypatch.setattr(asked, "total_bytes", lambda device: 2**20)
    with pytest.raises(MigaError, match=r"of memory and this server has 1\.0 MiB: make the picture smaller"):
        asked_of(VIDEO, engine, ServeOptions())


def test_bodies_that_are_none_are_refused(client: Client) -> None:
    def refused(body: bytes, status: int, sentence: str, kind: str = "application/json") -> None:
        answer = client.post("/v1/videos", body, content_type=kind)
        assert answer.status == status, answer.body
        assert sentence in answer.refusal

    refused(b"", 400, "is no JSON")
    refused(b"[1]", 400, "the body is [1]: send a JSON object")
    refused(b'{"prompt": "\xff"}', 400, "the body is no UTF-8")
    refused(b'{"prompt": "a", "seed": NaN}', 400, "NaN is no number of JSON")
    refused(b'{"prompt": "a", "prompt": "b"}', 400, "'prompt' is there twice")
    refused(b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "")
    refused(b'{"prompt": ' + b"[" * 40 + b"]" * 40 + b"}", 400, "nests deeper than 32 levels")
    refused(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "")
    refused(b'{"prompt": "a", "guidance_scale": 1e999}', 400, "guidance_scale must be a finite number")
    refused(b'{"prompt": "a"}', 415, "send application/json or multipart/form-data", "text/plain")
    refused(b"--b", 400, "", "multipart/form-data")
    refused(b"x" * (2**17 + 1), 413, "send at most 131072")
    chunks = iter([b"x" * 2**16] * 3)  # whose length nobody has said
    assert client.post("/v1/videos", chunks, content_type="application/json").status == 413
    many = "".join(f'--b\r\nContent-Disposition: form-data; name="a{i}"\r\n\r\n1\r\n' for i in range(300))
    refused(many.encode() + b"--b--\r\n", 400, "Too many fields", "multipart/form-data; boundary=b")


@pytest.mark.parametrize(
    "name",
    ["..", "../..", "%2e%2e", "..%2f..%2fetc%2fpasswd", ".lock", "video_", "a" * 5000, f"VIDEO_{'0' * 24}",
     *(f"video_{'0' * 23}{end}" for end in ("0", "%2f", "/", ".", "0%00", "0%0a", "g"))],
)  # fmt: skip
def test_names_that_are_no_ids_touch_nothing(client: Client, name: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/session"), ("DELETE", ""), ("POST", "/cancel")):
        answer = client.send(method, f"/v1/videos/{name}{path}")
        assert answer.status in (404, 405), answer.body
        assert answer.refusal


def test_browsers_are_let_in_from_the_servers_own_page_alone(client: Client) -> None:
    port = client.place.rpartition(":")[2]
    own = f"http://127.0.0.1:{port}"
    for headers, status in (
        ({"origin": own}, 200),
        ({"host": f"localhost:{port}", "origin": f"http://localhost:{port}"}, 200),
        ({"host": f"[::1]:{port}"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": f"{own}.evil.example"}, 403),
        ({"host": "evil.example"}, 403),  # whose name leads here
        ({"host": f"127.0.0.1.evil.example:{port}", "origin": f"http://127.0.0.1.evil.example:{port}"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-origin", "sec_fetch_mode": "cors"}, 200),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
    ):
        assert client.get("/v1/videos", **headers).status == status, headers
    for head in (
        b"Host: 127.0.0.1\r\nHost: evil.example",
        b"Host: 127.0.0.1\r\nOrigin: " + own.encode() + b"\r\nOrigin: x",
    ):
        assert _raw(client, b"GET /v1/videos HTTP/1.1\r\n" + head + b"\r\n\r\n").startswith(b"HTTP/1.1 400")
    with pytest.raises(InvalidStatus):
        connect(client.address.replace("http", "ws") + "/v1/videos/video_0/live", origin="http://evil.example")
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "access-control-allow-origin" not in client.get("/v1/videos", origin=own).headers


def _raw(client: Client, data: bytes) -> bytes:
    host, _, port = client.place.rpartition(":")
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        connection.sendall(data)
        return connection.recv(2**16)


def test_a_token_is_asked_for(engine: Engine, tmp_path: Path) -> None:
    with serving(engine, tmp_path, token="open sesame") as client:
        assert client.get("/health").json["needs_token"]
        assert client.get("/").status == 200
        for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic open sesame"},
                        {"authorization": "Bearer open sesame2"}, {"cookie": "token=open sesame"}):  # fmt: skip
            answer = client.get("/v1/videos", **headers)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.refusal.startswith("the token is missing or wrong")
            assert client.post("/v1/videos", VIDEO, **headers).status == 401
        allowed = Client(client.address, authorization="Bearer open sesame")
        assert allowed.get("/v1/videos").json["data"] == []
        name = allowed.start(num_frames=1)
        place = f"{client.address.replace('http', 'ws')}/v1/videos/{name}/live"
        for protocols in (None, ["miga"], ["miga", "miga.bearer.xxx"], ["miga.bearer.é".encode().decode("latin-1")]):
            with pytest.raises((InvalidStatus, ValueError)), connect(place, subprotocols=protocols):
                pass
        word = base64.urlsafe_b64encode(b"open sesame").decode().rstrip("=")
        with connect(place, subprotocols=["miga", f"miga.bearer.{word}"]) as live:
            assert live.subprotocol == "miga"
            assert json.loads(live.recv(SECONDS))["event"] == "status"


def test_an_address_of_others_needs_a_word_about_the_token(monkeypatch, capsys) -> None:
    assert ServeOptions(host="::1").is_local
    assert not ServeOptions(host="0.0.0.0", no_token=True).is_local
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match=f"host is {re.escape(host)}, which others can reach: give a token"):
            ServeOptions(host=host)
    for token in ("", " ", "ä", "a\nb"):
        with pytest.raises(ConfigError, match="the token must be printable ASCII and not empty"):
            ServeOptions(token=token)
    monkeypatch.setenv("MIGA_TOKEN", "a\tb")
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "the token must be printable" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.endswith('pip install "miga_engine[server]"\n')
