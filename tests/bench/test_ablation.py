"""The ablation's grid, its statistics on known numbers, and the judge's ROC on planted anomalies."""

import csv
import dataclasses
import fcntl
import itertools
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench.command import run_command
from bench.study import ablation, grid, judge, methods
from bench.study.paired import COMPARED, paired_difference, parts_table
from miga_engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.presets import PRESETS
from miga_engine.request import Request
from miga_engine.tiny import world
from miga_engine.tiny.text import read_prompt
from miga_engine.video.reading import read_video


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


def _run(study: ModuleType, *arguments: object) -> None:
    study.run(study.build_parser().parse_args([str(argument) for argument in arguments]))


# Prompts and methods ---------------------------------------------------------------------------------------------


def test_prompts_are_spread_over_the_world() -> None:
    told = methods.PROMPTS[: methods.NUM_PROMPTS]
    assert len(set(told)) == 24
    assert set(told) <= set(world.all_captions())
    for attribute in ("subject", "terrain", "time"):
        assert set(Counter(getattr(scene, attribute) for scene in methods.SCENES).values()) == {6}
    assert set(Counter(scene.colour for scene in methods.SCENES).values()) == {4, 5}
    for scene, following in itertools.pairwise(methods.SCENES):
        assert sum(a == b for a, b in zip(scene.labels, following.labels, strict=True)) <= 1


def test_open_prompts_leave_one_attribute_open() -> None:
    assert methods.PROMPTS[methods.NUM_PROMPTS :] == methods.OPEN_PROMPTS
    for i, (scene, prompt) in enumerate(zip(methods.SCENES, methods.OPEN_PROMPTS, strict=True)):
        named = read_prompt(prompt)
        assert {"subject", "colour", "terrain", "time"} - named.keys() == {("time", "terrain", "colour")[i % 3]}
        assert all(getattr(scene, name) == value for name, value in named.items())
    assert methods.prompt_indices(None) == list(range(24))
    assert methods.prompt_indices("any") == list(range(24, 48))
    assert methods.prompt_indices("terrain") == list(range(25, 48, 3))


def test_every_named_method_can_run_and_differs_from_every_other(engine: Engine) -> None:
    names = methods.expand_methods(["main", "alone", "sweep"])
    assert len(names) == len(methods.METHODS) + len(methods.SWEEP) + 1
    names.remove(methods.WORLD)
    resolved = [
        engine.resolve(methods.PROMPTS[0], num_frames=33, **methods.method_options(engine, method)) for method in names
    ]
    assert len({json.dumps(request.metadata("tiny")) for request in resolved}) == len(names)
    by_name = dict(zip(names, resolved, strict=True))
    assert by_name["default"].miga == PRESETS["tiny"].miga
    assert by_name["fifo"].miga.commit == "trailing"
    assert not by_name["bare"].miga.self_reflection
    assert by_name["bare"].miga.commit == "leading"


def test_a_method_can_be_changed_in_its_name(engine: Engine) -> None:
    changed = methods.method_options(
        engine, "default,stride=3,judge=latent,score_drop=0.5,self_reflection=false,num_inference_steps=30"
    )
    config = changed["miga"]
    assert (config.stride, config.judge, config.score_drop, config.self_reflection) == (3, "latent", 0.5, False)
    assert changed["num_inference_steps"] == 30
    rule = methods.method_options(engine, "default,guidance=apg,guidance_scale_end=1.5")
    assert (rule["guidance"], rule["guidance_scale_end"], rule["miga"]) == ("apg", 1.5, PRESETS["tiny"].miga)
    for wrong in ("nothing", "default,stride", "default,strides=3", "default,stride=x", "default,self_reflection=2"):
        with pytest.raises(ConfigError, match=wrong.split(",")[-1].split("=")[0]):
            methods.method_options(engine, wrong)


# The grid --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grid_is_filled_up_measured_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(methods.METHODS, "fifo", ("fifo", {"num_inference_steps": 13}))
    made = []
    make_video = grid.make_video
    monkeypatch.setattr(grid, "make_video", lambda engine, request, path, asked: (
        made.append(path.relative_to(tmp_path).as_posix()), make_video(engine, request, path, asked)))  # fmt: skip
    short = "bare,num_inference_steps=6"
    command = ["--folder", tmp_path, "--prompts", 1, "--seeds", 1, "--methods", "fifo", short, "world"]
    csv_path = tmp_path / "ablation.csv"

    _run(ablation, *command, "--num-frames", 33)
    assert made == ["fifo/00_0.mkv", f"{short}/00_0.mkv"]
    table = capsys.readouterr().out
    with csv_path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["fifo", short, "world"]
    assert float(rows[2]["accuracy"]) == 1
    assert float(rows[2]["subject_jitter"]) < float(rows[0]["subject_jitter"])
    assert {row["prompt"] for row in rows} == {methods.PROMPTS[0]}
    assert all(0 < float(row["subject_consistency"]) <= 1 and float(row["motion"]) > 0 for row in rows)
    # 6 passes of the seed clip, one window of 13 each; the clip fills the queue of 6; a pass of it for each of 9 frames
    assert int(rows[1]["window_frames"]) == 6 * 13 + 9 * 6
    difference = float(rows[1]["motion"]) - float(rows[0]["motion"])
    assert f"{difference:+.2f}" in next(line for line in table.splitlines() if line.startswith("| `bare"))

    # an interrupted run: one video half written, one missing; only that one is made again, and it is the same
    path = tmp_path / short / "00_0.mkv"
    before = read_video(path)
    assert before.shape == (33, 64, 96, 3)
    path.rename(path.with_name("00_0.part.mkv"))
    made.clear()
    csv_path.unlink()
    _run(ablation, *command, "--num-frames", 33, "--sheet", tmp_path / "sheet.png")
    assert made == [f"{short}/00_0.mkv"]
    assert np.array_equal(read_video(path), before)
    assert path.with_name("00_0.part.mkv").exists()  # whoever made it: names of unfinished files are nobody's
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(ConfigError, match=r"fifo, .* was made with other options: take it out, or give another --csv"):
        _run(ablation, *command, "--num-frames", 37)
    csv_path.unlink()
    with pytest.raises(ConfigError, match="num_frames 33, now 37 is asked for: give another --folder"):
        _run(ablation, *command, "--num-frames", 37)
    monkeypatch.setitem(methods.METHODS, "fifo", ("fifo", {"num_inference_steps": 14}))
    with pytest.raises(ConfigError, match="num_inference_steps 13, now 14"):
        _run(ablation, *command, "--num-frames", 33)
    with pytest.raises(ConfigError, match="--prompts is 25: give 1 to 24"):
        _run(ablation, "--folder", tmp_path, "--prompts", 25)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_no_video_is_made_whose_figures_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def make(engine: Engine, request: Request, path: Path, asked: dict[str, object]) -> None:
        made.append(path.parent.name)
        grid.render_world(methods.SCENES[0], request, path, asked)  # in a moment, and with no search

    monkeypatch.setattr(grid, "make_video", make)
    table = tmp_path / "table.csv"
    command = ["--prompts", 1, "--seeds", 1, "--num-frames", 33, "--csv", table, "--methods"]
    without, miga = "zigzag+stage2+guidance", "miga"
    _run(ablation, *command, without, miga, "--folder", tmp_path / "a")
    assert made == [miga]  # it never searched, so that it is the video without reflection, too
    first = _read(table)
    assert [row["method"] for row in first] == [without, miga]
    assert first[0]["motion"] == first[1]["motion"]
    assert first[0]["options"] != first[1]["options"]

    # another folder, on another machine: the file says what need not be made, and keeps what is not asked for now
    made.clear()
    _run(ablation, *command, "fifo", miga, "--folder", tmp_path / "b")
    assert made == ["fifo"]
    now = {row["method"]: row for row in _read(table)}
    assert list(now) == [without, miga, "fifo"]
    assert now == now | {row["method"]: row for row in first}
    assert "<br>+0.00 [+0.00, +0.00] |" in capsys.readouterr().out  # known and measured now are equal to the digit

    made.clear()
    (tmp_path / "b" / "bare").mkdir()
    with (tmp_path / "b" / "bare" / "00_0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="holds none of these videos yet"):
            _run(ablation, *command, "bare", "--folder", tmp_path / "b")
    assert "00_0.mkv is being made by another process" in capsys.readouterr().out
    assert made == []
    _run(ablation, *command, "bare", "--folder", tmp_path / "b")
    assert made == ["bare"]
    table.write_text("name,score\nx,1\n")
    with pytest.raises(ConfigError, match=r"table\.csv is no CSV file of an ablation"):
        _run(ablation, *command, "bare", "--folder", tmp_path / "b")


# Statistics ------------------------------------------------------------------------------------------------------


def _rows(values: dict[tuple[int, int], float]) -> list[dict[str, float]]:
    return [{"prompt_index": prompt, "seed": seed, "x": value} for (prompt, seed), value in values.items()]


def test_paired_differences_have_known_means_and_intervals() -> None:
    reference = _rows({(p, s): 10.0 * p + s for p in range(4) for s in range(2)})
    shifted = _rows({(p, s): 10.0 * p + s + 0.25 for p in range(4) for s in range(2)})
    assert paired_difference(shifted, reference, "x") == (0.25, 0.25, 0.25)

    # two prompts that differ by 0 and by 1: a resample's mean is 0, 0.5 or 1, a quarter of them 0 and a quarter 1
    two = _rows({(0, 0): 0.0, (0, 1): 1.0, (1, 0): 11.0, (1, 1): 12.0})
    assert paired_difference(two, reference, "x") == (0.5, 0.0, 1.0)

    # only what both have counts, and a prompt with more seeds weighs more in the mean
    some = _rows({(0, 0): 3.0, (0, 1): 4.0, (1, 0): 10.0, (9, 0): 1e6})
    assert paired_difference(some, reference, "x")[0] == 2.0
    with pytest.raises(ConfigError, match="no prompt and seed is common"):
        paired_difference(_rows({(9, 0): 1.0}), reference, "x")


def test_parts_are_told_from_the_same_method_without_them() -> None:
    def rows(method: str, videos: list[tuple[int, int]], frames: int, **changed: float) -> list[dict[str, Any]]:
        measured = dict.fromkeys(COMPARED, 0.5) | changed
        return [
            {"method": method, "prompt_index": prompt, "seed": seed, "window_frames": frames, **measured}
            for prompt, seed in videos
        ]

    table = parts_table(
        [
            *rows("a", [(0, 0), (1, 0), (2, 0)], 100),
            *rows("a+b", [(1, 0), (0, 0), (3, 0)], 125, accuracy=0.75, motion=0.25),
            *rows("c", [(7, 0)], 100),
        ],
        [("B", "a+b", "a"), ("C", "c", "a"), ("D", "a+d", "a")],  # of C and D no video is common
    )
    _, _, *lines = table.splitlines()
    assert len(lines) == 1
    name, difference, videos, calls, *values = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert (name, difference, videos, calls) == ("B", "`a+b` less `a`", "2", "+25 %")
    by_measure = dict(zip(COMPARED, values, strict=True))
    assert by_measure["accuracy"] == "**+25.00** [+25.00, +25.00]"
    assert by_measure["motion"] == "**-0.25** [-0.25, -0.25]"
    assert by_measure["colour_drift"] == "+0.00 [+0.00, +0.00]"
    assert parts_table(rows("a", [(0, 0)], 100), [("B", "a+b", "a")]) == ""


def test_every_part_is_a_difference_of_one_part(engine: Engine) -> None:
    options = {
        "kept end": {"commit_offset"},
        "Stage 1": {"zigzag_width"},
        "Stage 2": {"stage2_steps"},
        "guidance": {"guidance_frames"},
        "anchor": {"guidance_anchor"},
        "anchored window": {"guidance_anchor", "guidance_frames", "commit_offset"},
        "tail": {"tail_signal"},
        "history": {"history_guidance"},
        "past": {"past_context"},
        "reflection": {"self_reflection"},
        "like with like": {"search_baseline"},
        "refine": {"refine_steps"},
    }
    for part, *pair in methods.PARTS:
        method, without = (dataclasses.asdict(methods.method_options(engine, name)["miga"]) for name in pair)
        assert {name for name, value in method.items() if value != without[name]} == options[part], pair
    assert {part for part, *_ in methods.PARTS} == options.keys()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    zeros = _rows({(p, 0): 0.0 for p in range(24)})
    covered = 0
    for _ in range(200):
        drawn = _rows({(p, 0): value for p, value in enumerate(rng.normal(0.3, 1, 24))})
        _, low, high = paired_difference(drawn, zeros, "x", num_resamples=400)
        covered += low <= 0.3 <= high
    assert 0.86 <= covered / 200 <= 0.99


def test_auc_and_roc_on_known_numbers() -> None:
    assert judge.auc([1, 2, 3], [4, 5]) == 1.0
    assert judge.auc([4, 5], [1, 2, 3]) == 0.0
    assert judge.auc([1, 1], [1]) == 0.5
    assert judge.auc([1, 2, 3], [2, 4]) == 0.75
    false, true = judge.roc([1, 2, 3], [2, 4])
    assert false.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1])
    assert true.tolist() == pytest.approx([0, 0.5, 0.5, 1, 1])
    rng = np.random.default_rng(0)
    negatives, positives = rng.normal(0, 1, 300), rng.normal(1, 1, 200)
    false, true = judge.roc(negatives, positives)
    area = np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
    assert area == pytest.approx(judge.auc(negatives, positives))


# The judge -------------------------------------------------------------------------------------------------------


def test_steps_planted_together_are_apart() -> None:
    lots = judge._apart([16, 2, 4, 6, 8, 10, 12, 14], 8)
    assert sorted(itertools.chain(*lots)) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all(b - a >= 8 for lot in lots for a, b in itertools.pairwise(lot))
    assert len(lots) == 4


@pytest.mark.slow
def test_the_judge_of_latents_sees_what_was_planted(engine: Engine) -> None:
    tiny = engine.preset
    few = dataclasses.replace(tiny.miga, zigzag_width=2, stage2_steps=2)  # a queue that fits one window
    engine.preset = dataclasses.replace(
        tiny, sampling=dataclasses.replace(tiny.sampling, num_inference_steps=10), miga=few
    )
    try:
        judgements = judge.judge_run(engine, 0, [5, 7], num_points=1)
    finally:
        engine.preset = tiny
    planted = [j for j in judgements if j.kind]
    assert len(planted) == len(judge.KINDS) * 2 * len(judge.VARIANTS)
    score = {(j.kind, j.judge_step): j.score for j in planted if (j.judge, j.channels) == ("latent", "all")}
    for step, margin in ((5, 0.04), (7, 0.1)):
        assert score["own", step] - score["swap", step] > margin
        assert score["own", step] - score["cut", step] > margin
    # every kind is judged against the same undisturbed pass before it
    assert len({(j.judge_step, j.judge, j.channels, j.previous) for j in planted}) == 2 * len(judge.VARIANTS)

    rows = judge.summarise(judgements)
    assert len(rows) == len(judge.VARIANTS) * 2 * (len(judge.KINDS) + 2)
    cut = next(
        r for r in rows if (r["judge"], r["channels"], r["judge_step"], r["kind"]) == ("latent", "all", 7, "cut")
    )
    assert (cut["auc_drop"], cut["auc_planted"], cut["detected"]) == (1.0, 1.0, 1.0)
    assert cut["num_positives"] == 1
    natural = [r for r in rows if r["kind"] == "natural"]
    assert all(r["num_positives"] > 0 and 0 <= r["auc_drop"] <= 1 for r in natural)
    assert "| latent/all | " in judge.markdown_table(rows)


def test_planted_frames_stand_at_the_level_of_those_they_replace(engine: Engine) -> None:
    probe = judge._Probe(engine, 0, num_points=1)
    store, run = probe.run.store, probe.run
    run.head, run.tail = 40, 40 + run.handoff_step * probe.width
    frames = [probe.frames(step) for step in (3, 2, 1)]
    assert [f.start - 40 for f in frames] == [probe.width * (run.handoff_step - 1 - step) for step in (3, 2, 1)]
    latents = torch.full((2 * probe.width, *store.frame_shape), 2.0)
    store.sample.fill_(7.0)
    probe.plant(latents, 3, torch.Generator().manual_seed(0))
    for step, numbers in zip((3, 2), frames, strict=False):
        slots = store.slots(numbers)
        sigma = float(run.schedule.sigmas[step])
        noise = (store.sample[slots] - (1 - sigma) * 2.0) / sigma
        assert abs(float(noise.mean())) < 0.05
        assert abs(float(noise.std()) - 1) < 0.05
        assert set(store.step_index[slots]) == {step}
        assert set(store.history_length[slots]) == {0}
    assert bool((store.sample[store.slots(frames[2])] == 7.0).all())


def test_the_judge_command_keeps_what_it_has_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {
            "prompt": 0,
            "kind": kind,
            "judge_step": 4,
            "judge": by,
            "channels": channels,
            "score": 0.5 - 0.1 * i,
            "previous": 0.5,
        }
        for by, channels in judge.VARIANTS
        for i, kind in enumerate(["", *judge.KINDS])
    ]
    (tmp_path / "00_2.json").write_text(json.dumps(records))
    _run(judge, "--folder", tmp_path, "--prompts", 1, "--judge-steps", 4)
    assert "| x0/all | anomalies | 1.000 (100 % at 0.000) |" in capsys.readouterr().out
    with (tmp_path / "judge.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(judge.VARIANTS) * (len(judge.KINDS) + 2)
    with pytest.raises(ConfigError, match="--judge-steps has 17: give steps from 1 to 16"):
        _run(judge, "--folder", tmp_path, "--judge-steps", 17)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["judge", "--judge-steps", "17"], "judge: --judge-steps has 17: give steps from 1 to 16"),
        (["judge", "--points"], "argument --points: expected one argument (see: python -m bench.study.judge --help)"),
        (["ablation", "--methods", "none"], "python -m bench.study.ablation: method is 'none': choose fifo, "),
        (["ablation", "--existing", "--methods", "fifo"], "holds none of these videos yet: leave --existing out"),
    ],
)
def test_the_commands_say_what_is_wrong(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = {"ablation": ablation, "judge": judge}[command[0]]
    assert run_command(study.build_parser(), study.run, ["--folder", str(tmp_path), *command[1:]]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert message in told
