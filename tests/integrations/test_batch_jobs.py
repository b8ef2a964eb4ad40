"""Files of jobs, manifests and stores of `miga batch`, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miga_engine.errors import ConfigError, OutputError
from miga_engine.integrations.batch.jobs import Job, read_jobs
from miga_engine.integrations.batch.manifest import NAME, Manifest
from miga_engine.integrations.batch.settings import BatchOptions
from miga_engine.integrations.batch.store import Folder, UrlStore, store_of


def _jobs(path: Path, text: str, seeds: list[int] | None = None, **common: object) -> list[Job]:
    path.write_text(text, encoding="utf-8")
    return read_jobs(path, {"num_frames": 9, **common}, seeds or [])


def test_json_lines_take_options_and_timelines(tmp_path: Path) -> None:
    one, two, three = _jobs(
        tmp_path / "jobs.jsonl",
        '{"prompt": "a red kite", "seed": 3, "num_frames": 25, "guidance-scale": 2.5, "stride": 4}\n\n'
        '{"prompt": {"0": "dawn", "8": "dusk"}, "name": "day", "miga": {"stride": 5}, "image": "a.png"}\n'
        '{"prompt": "dawn", "prompt_at": [[8, "dusk"]], "height": null}\n',
        width=64,
    )
    assert one.prompt == {0: "a red kite"}
    assert one.options == {"seed": 3, "num_frames": 25, "guidance_scale": 2.5, "width": 64, "miga": {"stride": 4}}
    assert one.name == f"a-red-kite-s3-{one.digest[:6]}"
    assert (two.name, two.prompt) == ("day", {0: "dawn", 8: "dusk"})
    assert two.options["image"] == str(tmp_path / "a.png")  # beside the file of jobs
    assert two.options["miga"] == {"stride": 5}
    assert three.prompt == two.prompt
    assert three.options == {"num_frames": 9, "width": 64, "seed": 0, "miga": {}}


def test_a_table_and_a_text_say_the_same(tmp_path: Path) -> None:
    table = 'prompt,seed,num_frames,moving_phase,solver,name\n"a kite, red",7,13,False,euler,\n{""0"": ""b""},,,,,two\n'
    first, second = _jobs(tmp_path / "jobs.csv", table.replace('{""0"": ""b""}', '"{""0"": ""b""}"'))
    assert first.prompt == {0: "a kite, red"}
    assert first.options == {"num_frames": 13, "solver": "euler", "seed": 7, "miga": {"moving_phase": False}}
    assert (second.name, second.prompt, second.options["seed"]) == ("two", {0: "b"}, 0)
    (line,) = _jobs(tmp_path / "jobs.txt", "\n  a kite, red\n\n")
    assert line.prompt == first.prompt


def test_seeds_make_a_video_each_and_names_follow_from_what_is_asked(tmp_path: Path) -> None:
    text = '{"prompt": "a"}\n{"prompt": "b", "seed": 9}\n{"prompt": "c", "name": "c"}\n'
    jobs = _jobs(tmp_path / "jobs.jsonl", text, BatchOptions(seeds="0-1, 5").seed_numbers())
    assert [(job.prompt[0], job.options["seed"]) for job in jobs] == [
        *(("a", seed) for seed in (0, 1, 5)), ("b", 9), *(("c", seed) for seed in (0, 1, 5))
    ]  # fmt: skip
    assert [job.name for job in jobs if job.prompt[0] == "c"] == ["c-s0", "c-s1", "c-s5"]
    moved = _jobs(tmp_path / "jobs.jsonl", '{"prompt": "new"}\n' + text, [0, 1, 5])
    assert {job.name for job in jobs} <= {job.name for job in moved}
    longer = _jobs(tmp_path / "jobs.jsonl", text, [0, 1, 5], num_frames=13)
    assert {job.name for job in jobs} & {job.name for job in longer} == {"c-s0", "c-s1", "c-s5"}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("jobs.jsonl", '{"prompt": "a"', "line 1 of .* is no JSON"),
        ("jobs.jsonl", '{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        ("jobs.jsonl", "[1]", "line 1 of .* is \\[1\\]: give an object"),
        ("jobs.jsonl", '{"prompt": "a"}\n{"prompt": "a"}', "line 1 of .* and line 2 of .* ask for the same video"),
        ("jobs.jsonl", '{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "X"}', "have the same name X"),
        ("jobs.jsonl", '{"prompt": "a", "name": "../x"}', "has the name '../x'"),
        ("jobs.jsonl", '{"prompt": "a", "prompts": 1}', "unknown option 'prompts'; the options are .*prompt_at"),
        ("jobs.jsonl", '{"prompt": "a", "num_frames": 9, "num-frames": 9}', "gives num_frames twice"),
        ("jobs.jsonl", '{"prompt": "a", "moving_phase": "yes"}', "gives moving_phase as 'yes': give true or false"),
        ("jobs.jsonl", '{"prompt": "a", "miga": 3}', "gives miga as 3"),
        ("jobs.jsonl", '{"seed": 3}', "has the prompt None: give a text, or a timeline"),
        ("jobs.jsonl", '{"prompt": {"-1": "a"}}', "has the prompt"),
        ("jobs.jsonl", '{"prompt": "a", "prompt_at": [[0, "b"]]}', "has the prompt_at"),
        ("jobs.jsonl", '{"prompt": "a", "segments": 0}', "gives segments as 0: give a number from 1 to 1000"),
        ("jobs.jsonl", '{"prompt": "a", "segments": 10}', "has 9 frames to cut into 10 segments"),
        ("jobs.jsonl", '{"prompt": "a", "image": 3}', "gives image as 3: give a file"),
        ("jobs.csv", "prompt,prompt\na,b\n", "two columns of one name"),
        ("jobs.csv", "prompt,seed\na kite, red,3\n", "line 2 of .* has not as many cells"),
        ("jobs.csv", 'prompt\n"a"b\n', "is no table in CSV"),
        ("jobs.txt", "\n", "holds no job"),
        ("jobs.yaml", "a", "is no file of jobs: give .jsonl, .csv, or .txt"),
    ],
)
def test_what_is_no_job_is_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _jobs(tmp_path / name, text)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jobs(tmp_path / "none.jsonl", {}, [])
    (tmp_path / "jobs.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        read_jobs(tmp_path / "jobs.txt", {}, [])


def test_segments_are_jobs_that_begin_anew(tmp_path: Path) -> None:
    text = '{"prompt": {"0": "a", "10": "b", "16": "c"}, "num_frames": 25, "seed": 3, "image": "a.png", "name": "x"}'
    (whole,) = _jobs(tmp_path / "jobs.jsonl", text.replace('"name"', '"segments": 3, "name"'))
    (as_one,) = _jobs(tmp_path / "jobs.jsonl", text)
    assert as_one.parts() == [as_one]
    assert whole.digest != as_one.digest
    first, second, third = whole.parts()
    assert [part.name for part in whole.parts()] == ["x.1of3", "x.2of3", "x.3of3"]
    assert [part.num_frames for part in whole.parts()] == [8, 8, 9]
    assert [part.prompt for part in whole.parts()] == [{0: "a"}, {0: "a", 2: "b"}, {0: "c"}]
    assert (first.options["seed"], "image" in first.options) == (3, True)
    assert len({part.options["seed"] for part in whole.parts()}) == 3
    assert not {"image", "video", "video_frames"} & {*second.options, *third.options}
    assert whole.to_record()["segments"] == 3
    (by_option,) = read_jobs(tmp_path / "jobs.jsonl", {}, [], 3)
    assert by_option.digest == whole.digest


@pytest.mark.parametrize("seeds", ["", "a", "3-1", "1,1", "-1", f"{2**64}", "0-9999999"])
def test_seeds_that_are_none_are_refused(seeds: str) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        BatchOptions(seeds=seeds)


@pytest.fixture(params=["folder", "url", "moved"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder | UrlStore:
    """A folder, a store in which files appear whole, and one in which they are moved into their place."""
    if request.param == "url":
        pytest.importorskip("fsspec").filesystem("memory").store.clear()
        return store_of("memory://bucket/batch")
    return store_of(f"file://{tmp_path}/batch" if request.param == "moved" else str(tmp_path / "batch"))


def test_a_store_keeps_texts_and_files(store: Folder | UrlStore) -> None:
    assert isinstance(store, UrlStore) == ("://" in store.name)
    assert (store.names(), store.read("text")) == (set(), "")
    store.append("text", "one")
    store.append("text", "zwei ß")
    assert store.read("text") == "one\nzwei ß\n"
    store.write("text", "new")
    assert store.read("text") == "new"
    with store.workplace(["a.bin", "b.bin"]) as folder:
        (folder / "a.bin").write_bytes(b"a")
        store.keep(folder, "a.bin")
        store.keep(folder, "b.bin")  # which is not there
    with store.workplace(["a.bin", "b.bin"]) as folder:
        assert (folder / "a.bin").read_bytes() == b"a"
        assert not (folder / "b.bin").exists()
    assert store.names() == {"text", "a.bin"}
    store.remove("a.bin")
    store.remove("a.bin")
    assert store.names() == {"text"}


def test_a_file_that_is_moved_into_its_place_is_there_whole_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(f"file://{tmp_path}/batch")
    store.write("text", "old")

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._files, "mv", fails)
    with pytest.raises(OutputError, match=r"cannot write text in file://.*: No space left on device"):
        store.write("text", "new")
    assert store.read("text") == "old"


def test_a_folder_is_one_batchs_at_a_time(tmp_path: Path) -> None:
    first, second = store_of(str(tmp_path)), store_of(str(tmp_path))
    with first.held(), pytest.raises(OutputError, match="another batch is being made in"):
        second.held().__enter__()
    with second.held():
        pass


def test_a_store_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(OutputError, match="cannot reach nosuch://bucket"):
        store_of("nosuch://bucket/x")


def test_the_manifest_has_a_line_a_video_in_order(store: Folder | UrlStore, tmp_path: Path) -> None:
    one, two = _jobs(tmp_path / "jobs.txt", "a\nb")
    manifest = Manifest(store)
    for job in (two, one):
        manifest.add(job, {"video": f"{job.name}.mp4", "frames": "00", "num_frames": 9})
    manifest.put_in_order([one, two])
    lines = [json.loads(line) for line in store.read(NAME).splitlines()]
    assert [line["name"] for line in lines] == [one.name, two.name]
    again = Manifest(store)
    assert again.is_made(one, {f"{one.name}.mp4"})
    assert not again.is_made(one, set())  # the video is gone
    again.forget([one.name])
    assert list(Manifest(store).made) == [two.name]
    named = [Job("x", {0: prompt}, {"num_frames": 9, "miga": {}}, "line 1 of jobs.txt") for prompt in "ab"]
    again.add(named[0], {"video": "x.mp4", "frames": "00"})
    with pytest.raises(OutputError, match=r"x\.mp4 in .* was made of other options than line 1 of jobs.txt asks for"):
        again.is_made(named[1], {"x.mp4"})


def test_a_manifest_is_a_file_of_jobs(tmp_path: Path) -> None:
    jobs = _jobs(tmp_path / "jobs.jsonl", '{"prompt": {"0": "a", "5": "b"}, "miga": {"stride": 3}}\n{"prompt": "c"}')
    manifest = Manifest(store_of(str(tmp_path)))
    for job in jobs:
        manifest.add(job, {"video": "v.mp4", "frames": "00"})
    again = read_jobs(tmp_path / NAME, {"num_frames": 99}, [])
    assert [(job.name, job.digest) for job in again] == [(job.name, job.digest) for job in jobs]
    assert list(Manifest.made_in(str(tmp_path / NAME))) == [job.name for job in jobs]
    with pytest.raises(OutputError, match="is no manifest"):
        Manifest.made_in(str(tmp_path / "jobs.jsonl"))


def test_a_torn_last_line_is_dropped_and_a_strange_one_refused(tmp_path: Path) -> None:
    one, two = _jobs(tmp_path / "jobs.txt", "a\nb")
    store = store_of(str(tmp_path))
    Manifest(store).add(one, {"video": "a.mp4", "frames": "00"})
    store.write(NAME, store.read(NAME) + '{"name": "b", "ma')
    manifest = Manifest(store)
    assert list(manifest.made) == [one.name]
    manifest.add(two, {"video": "b.mp4", "frames": "11"})
    assert list(Manifest(store).made) == [one.name, two.name]
    store.write(NAME, '{"name": 3}\n')
    with pytest.raises(OutputError, match=r"line 1 of manifest.jsonl in .* is none of a batch"):
        Manifest(store)
