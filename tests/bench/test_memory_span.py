"""Gaps in which the subject is hidden, what they are counted under, and the study's files."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from bench.study import memory
from bench.study.grid import write_csv
from bench.study.memory import Gap, from_text, gaps, kept, to_text
from miga_engine.errors import ConfigError
from miga_engine.tiny import reader, world

FRAMES = np.arange(4000)
COLOURS = reader.CLASSES["colour"]


def _reading(scene: world.Scene) -> reader.Reading:
    """What a reader that is never wrong reads: the subject's area as it disappears."""
    area = 0.05 * (1 - world.away([scene] * len(FRAMES), FRAMES))
    factors = {
        name: np.full(len(FRAMES), values.index(getattr(scene, name)))
        for name, values in reader.CLASSES.items()
        if getattr(scene, name)
    }
    nowhere = np.full((len(FRAMES), 4), np.nan)
    return reader.Reading(factors, area, nowhere[:, :2], nowhere)


def _scenes(count: int = 12) -> list[world.Scene]:
    rng = np.random.default_rng(5)
    return [dataclasses.replace(world.sample_rich_scene(rng), behind=world.COVERS[i % 2]) for i in range(count)]


def test_gaps_of_true_scenes_are_as_long_as_they_hide_and_keep_every_colour() -> None:
    lengths = set()
    for scene in _scenes():
        found = gaps(_reading(scene))
        assert len(found) >= len(FRAMES) // (192 + 240 + 60) - 1
        assert all(gap.before == gap.after == scene.colour for gap in found)
        assert len({gap.frames for gap in found}) <= 2  # a frame more or less, by where its edges fall
        assert all(16 <= gap.frames <= 192 + 30 for gap in found)
        lengths |= {gap.span for gap in found}
    assert len(lengths) >= 3


def test_a_slip_of_the_reader_neither_hides_nor_shows_the_subject() -> None:
    reading = _reading(_scenes(1)[0])
    found = gaps(reading)
    area = reading.area.copy()
    area[found[0].start + 6] = 0.05
    area[found[1].start - 30] = 0.0
    assert gaps(dataclasses.replace(reading, area=area)) == found


def test_a_subject_that_comes_back_in_another_colour_has_not_kept_it() -> None:
    reading = _reading(_scenes(1)[0])
    first = gaps(reading)[0]
    colours = reading.factors["colour"].copy()
    colours[first.start + first.frames // 2 :] = (colours[0] + 1) % len(COLOURS)
    found = gaps(dataclasses.replace(reading, factors={**reading.factors, "colour": colours}))
    assert [gap.before == gap.after for gap in found] == [False, *[True] * (len(found) - 1)]
    assert found[0].after == COLOURS[colours[-1]]


def test_gaps_are_counted_under_the_nearest_span() -> None:
    spans = {4 * g: Gap(0, 4 * g, "red", "red").span for g in (1, 4, 6, 7, 12, 16, 17, 18, 24, 33, 35, 48, 60)}
    assert spans == {4: 4, 16: 4, 24: 4, 28: 12, 48: 12, 64: 12, 68: 24, 72: 24, 96: 24, 132: 24, 140: 48, 192: 48,
                     240: 48}  # fmt: skip


def test_shares_and_their_intervals() -> None:
    same, other = Gap(0, 16, "red", "red"), Gap(0, 16, "red", "blue")
    assert kept([[same, same], [same]], 4) == (3, 1.0, 1.0, 1.0)
    count, share, low, high = kept([[same, other]] * 10 + [[same] * 3] * 10, 4)
    assert (count, share) == (50, 0.8)
    assert 0.6 < low < share < high < 0.95
    assert kept([[same]], 48)[0] == 0
    assert math.isnan(kept([[same]], 48)[1])


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = [Gap(120, 31, "red", "blue"), Gap(400, 190, "green", "green")]
    row = dict(zip(memory.COLUMNS, ("miga", "0", "a kite, far away", "1", "1201", to_text(found)), strict=True))
    path = tmp_path / "memory.csv"
    assert memory.read_rows(path) == []
    write_csv(path, [row])
    assert memory.read_rows(path) == [row]
    assert from_text(row["gaps"]) == found
    assert "| `miga` | 1 | none | 0% [0%, 0%] of 1 | none | 100% [100%, 100%] of 1 |" in memory.table([row])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"is no CSV file of this study"):
        memory.read_rows(path)


def test_prompts_say_how_the_subject_disappears_and_not_what_it_looks_like() -> None:
    asked = memory.prompts(8)
    assert len(set(asked)) == 8
    for i, prompt in enumerate(asked):
        assert not {*COLOURS, *world.PATTERNS} - {"plain", "green"} & {*prompt.split()}
        assert prompt.endswith(f"behind {world.COVERS[i % 2]}")


def test_without_a_reader_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no reader at .*none.safetensors: give the file"):
        reader.load_reader(tmp_path / "none.safetensors")
