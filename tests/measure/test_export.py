"""Exports have the names and keys that the benchmarks' scripts read, by the papers' protocol."""

import json
import subprocess
from pathlib import Path

import golden_model
import pytest
from measured import miga

from miga_engine.errors import ConfigError, OutputError
from miga_engine.measure import export
from miga_engine.video.reading import read_metadata, read_video

SUITE = {
    "15": [
        {"prompt_gen": "a red kite / over\ngreen hills at noon", "element_extract": {"Scene Type": "hills"},
         "auto_gen_question": {"Scene Type": ["Are there hills?"]}, "prompt_gen_list_extract": []},
        {"prompt_gen": "```\na blue bird over dark hills at night\n```", "element_extract": {}, "auto_gen_question": {},
         "prompt_gen_list_extract": []},
    ]
}  # fmt: skip
SMALL = ["--height", 32, "--width", 48, "--num-inference-steps", 8, "--zigzag-width", 2, "--stage2-steps", 3,
         "--guidance-frames", 1, "--stride", 2, "--judge-step", 3]  # fmt: skip


@pytest.mark.slow
def test_vbench_export_is_made_once_and_goes_on(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red balloon over snowy hills at dawn\n\na white plane over a desert at noon\n")
    out = tmp_path / "out"
    arguments = ["eval", "export", out, "--format", "vbench", "--prompts", prompts, "--samples", 1]
    arguments += ["--num-frames", 9, "--seed", 3, *SMALL]
    assert miga(*arguments) == 0
    assert "2 videos, 2 of them made now" in capsys.readouterr().err
    names = [f"{line}-0.mp4" for line in prompts.read_text().splitlines() if line]
    assert sorted(p.name for p in (out / "videos").iterdir()) == sorted(names)
    video = out / "videos" / names[1]
    assert read_video(video).shape == (9, 32, 48, 3)
    assert (read_metadata(video)["prompt"], read_metadata(video)["seed"]) == (names[1][:-6], 3)
    info = json.loads((out / "full_info.json").read_text())
    assert [entry["prompt_en"] for entry in info] == [name[:-6] for name in names]
    assert {"subject_consistency", "dynamic_degree"} < set(info[0]["dimension"])
    script = (out / "run.sh").read_text()
    subprocess.run(["sh", "-n", out / "run.sh"], check=True)
    compile(script.partition("<<'PYTHON'\n")[2].partition("\nPYTHON\n")[0], "run.sh", "exec")
    video.unlink()
    before = (out / "videos" / names[0]).stat().st_mtime_ns
    assert miga(*arguments) == 0
    assert "1 of them made now" in capsys.readouterr().err
    assert (out / "videos" / names[0]).stat().st_mtime_ns == before
    assert not list(out.glob("unfinished*"))
    assert miga(*arguments, "--guidance-scale", 1) == 2
    assert "made with other options" in capsys.readouterr().err


def test_vbenchs_own_list_keeps_its_entries_and_prompts_must_be_file_names(tmp_path):
    entries = [
        {"prompt_en": "a cat", "dimension": ["color", "temporal_flickering"], "auxiliary_info": {"color": "red"}}
    ]
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(entries))
    clips, written = export.plan_vbench(path, 5)
    assert [clip.path for clip in clips] == [f"videos/a cat-{i}.mp4" for i in range(5)]
    assert [clip.sample for clip in clips] == list(range(5))
    assert json.loads(written["full_info.json"]) == entries
    assert "dimension_list=['temporal_flickering']" in written["run.sh"]
    for name, content, message in (
        ("slash.txt", "either/or", "without /"),
        ("long.txt", "é" * 130, "shorten it to 249 bytes"),
        ("empty.txt", "\n", "holds no prompts"),
        ("broken.json", "{", "not valid JSON"),
        ("other.json", '{"a": 1}', "prompt_en"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            export.plan_vbench(tmp_path / name, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        export.plan_vbench(tmp_path / "absent.txt", 1)


def test_narrlv_export_has_the_names_and_keys_its_scripts_read(tmp_path):
    path = tmp_path / "prompt_suit_v4_scene_attribute_tna_1.json"
    path.write_text(json.dumps(SUITE))
    clips, written = export.plan_narrlv(tmp_path)
    folder = f"videos/{path.stem}"
    assert [clip.path for clip in clips] == [
        f"{folder}/15_0_a red kite   over gr.mp4",
        f"{folder}/15_1_a blue bird over dar.mp4",
    ]
    assert clips[1].prompt == "a blue bird over dark hills at night"
    for clip in clips:  # as NarrLV finds the questions of a video
        key, index = Path(clip.path).name.split("_")[:2]
        entry = json.loads(written[f"prompt_suit/{path.name}"])[key][int(index)]
        assert entry["auto_gen_question_1"] == entry["auto_gen_question"]
        assert entry["element_extract_1"] == entry["element_extract"]
    script = tmp_path / "run.sh"
    script.write_text(written["run.sh"])
    subprocess.run(["sh", "-n", script], check=True)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no prompt suite of NarrLV"):
        export.plan_narrlv(path)


@pytest.mark.slow
def test_protocol_is_the_papers_and_a_foreign_export_is_left_alone(tmp_path, tmp_path_factory):
    from miga_engine.engine import Engine

    engine = Engine.from_pretrained("tiny", "meta")
    videocrafter2 = Engine.from_pretrained(golden_model.build_videocrafter2(tmp_path_factory.mktemp("vc2")), "meta")
    assert [e.bundle.facts.protocol_frames for e in (videocrafter2, engine)] == [128, 161]
    (tmp_path / "protocol.json").write_text("{}")
    with pytest.raises(OutputError, match="made with other options"):
        export.export(engine, tmp_path, [export.Clip("videos/a-0.mp4", "a")], {})
    assert [p.name for p in tmp_path.iterdir()] == ["protocol.json"]
