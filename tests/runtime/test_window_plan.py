"""Window plans: every frame is committed exactly once, in bounds; what contradicts itself is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from miga_engine.config import MigaConfig, fifo_config
from miga_engine.errors import ConfigError
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.window_plan import guidance_indices, iter_windows, next_cut, plan_windows


@pytest.mark.parametrize("commit", ["leading", "trailing"])
@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_every_frame_is_committed_exactly_once_and_read_in_bounds(window, commit):
    for stride in range(1, window + 1):
        padding = window - stride if commit == "trailing" else 0
        for num_frames in range(1 + padding, 3 * window + 3):
            for phase in range(stride if commit == "leading" else 1):
                plan = plan_windows(num_frames, window, stride, phase, commit)
                committed = [frame for _, first, stop in plan for frame in range(first, stop)]
                assert committed == list(range(padding, num_frames))
                for start, first, stop in plan:
                    assert 0 <= start <= first < stop <= min(start + window, num_frames)


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_an_offset_moves_what_is_kept_and_not_what_is_read(window):
    for stride in range(1, window + 1):
        for offset in range(window - stride + 1):
            for num_frames in range(1, 3 * window + 3):
                for phase in range(stride):
                    plan = plan_windows(num_frames, window, stride, phase, offset=offset)
                    leading = plan_windows(num_frames, window, stride, phase)
                    assert [start for start, *_ in plan] == [start for start, *_ in leading]
                    assert [frame for _, first, stop in plan for frame in range(first, stop)] == list(range(num_frames))
                    for start, first, stop in plan:
                        assert first == (start + offset if start else 0)
                        assert first < stop <= min(start + window, num_frames)


@pytest.mark.parametrize("spacing", [1, 2, 5, 50])
@pytest.mark.parametrize("offset", [None, 1, 9, 30])
def test_guidance_frames_are_different_frames_before_the_window(offset, spacing):
    for frames in range(1, 5):
        for width in (1, 2, 4, 7):
            for start in range(120):
                found = guidance_indices(start, frames, width, offset, spacing)
                assert found == sorted(set(found))
                assert len(found) == (frames if start >= frames else 0)
                assert all(0 <= index < start for index in found)


def test_guidance_is_as_far_apart_as_asked_where_the_queue_reaches_so_far_back():
    assert guidance_indices(76, 2, 4, spacing=8) == [42, 74]
    assert guidance_indices(22, 2, 4, spacing=8) == [0, 20]  # the farthest there is, and the nearest as asked
    assert guidance_indices(7, 2, 4, spacing=8) == [1, 4]


def test_endless_cuts_are_those_of_a_long_finite_sequence():
    for window, stride in ((9, 4), (21, 10), (5, 5)):
        for phase in range(stride):
            finite = list(iter_windows(1000, window, stride, phase))[:20]
            start = 0
            for expected_start, _, expected_stop in finite:
                assert start == expected_start
                start = next_cut(start, None, window, stride, phase)
                assert start == expected_stop


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 9, 4), "num_frames is 0: give at least 1"),
        ((5, 4, 5), "stride is 5: give a number between 1 and the window"),
        ((5, 4, 2, 2), "phase is 2: give a number between 0 and stride"),
        ((5, 4, 2, 0, "middle"), "commit is 'middle': give 'leading' or 'trailing'"),
        ((2, 4, 2, 0, "trailing"), "more than the 2 frames of padding"),
        ((5, 4, 2, 0, "leading", 3), "offset is 3: give a number between 0 and window − stride = 2"),
    ],
)
def test_plan_refuses(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan_windows(*arguments)


def _commits(layout: RunLayout, head: int, tail: int, num_passes: int | None, newest: int) -> list[int]:
    windows = layout.queue_windows(head, tail, num_passes, newest)
    return [int(frame) for window in windows for frame in window.frames[window.commit_start : window.commit_stop]]


@pytest.mark.parametrize("apart", [1, 3])
@pytest.mark.parametrize("options", [{}, {"commit_offset": -1, "past_context": True}, {"guidance_frames": 0}])
def test_windows_lie_on_one_side_of_a_boundary_and_change_every_frame_but_the_given_once(options, apart) -> None:
    """Over all boundaries, stages of the queue and numbers of given frames."""
    config = MigaConfig(**{"zigzag_width": 2, "stage2_steps": 3, "guidance_frames": 2, "stride": 3, "judge_step": 3,
                           "passes_per_advance": apart, "self_reflection": False, **options})  # fmt: skip
    for boundary, num_given in itertools.product((None, 1, 4, 5, 11, 12), (0, 1, 5)):
        layout = RunLayout(config, 15, 9, 60, num_given, boundary)
        length = 2 * layout.num_groups
        for head, newest, num_passes in itertools.product((0, 2, 8), range(apart), (None, 0, 1, 5)):
            for tail in (head + length,) if num_passes is not None else range(head + 4, head + length, 2):
                commits = _commits(layout, head, tail, num_passes, newest)
                assert commits == [frame for frame in range(head, tail) if frame >= num_given]
                if boundary is None:
                    continue
                for window in layout.queue_windows(head, tail, num_passes, newest):
                    queued = window.frames[(window.frames >= head) & (window.frames >= num_given)]
                    steps = (tail - 1 - queued) // 2 * apart + newest
                    assert len({*(steps >= boundary).tolist()}) == 1


def test_the_noisier_end_follows_the_other_options() -> None:
    """`commit_offset` -1 is what the number written out would be, and 0 where a window may leave none."""
    for window, stride, guidance in itertools.product((9, 13, 21), (None, 1, 4), (0, 1, 4)):
        config = MigaConfig(stride=stride, guidance_frames=guidance, self_reflection=False, stage2_steps=2)
        written = dataclasses.replace(config, commit_offset=window - guidance - config.stride_of(window))
        short = dataclasses.replace(config, commit_offset=-1)
        layouts = [RunLayout(each, 12, window, 50) for each in (short, written)]
        assert layouts[0].commit_offset == written.commit_offset == written.commit_offset_of(window)
        assert layouts[0].num_slots == layouts[1].num_slots
        for num_passes in range(5):
            plans = [layout.queue_windows(0, 40, num_passes) for layout in layouts]
            assert [str(window) for window in plans[0]] == [str(window) for window in plans[1]]
    bound = MigaConfig(commit_offset=-1, self_reflection=False)
    for other in ({"window_order": "sequential"}, {"commit": "trailing", "guidance_frames": 0}):
        config = dataclasses.replace(bound, **other)
        config.check(54, 21)
        assert config.commit_offset_of(21) == 0
    assert fifo_config(bound, 21).commit_offset == 0
