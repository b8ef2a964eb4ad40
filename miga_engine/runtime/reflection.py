"""Self-reflection (DCE): watch the consistency score of the queue, search again where it falls (docs/method.md §4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from miga_engine.config import MigaConfig
from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import Denoiser, Window
from miga_engine.runtime.judges import JUDGES
from miga_engine.runtime.tail import Tail
from miga_engine.runtime.window_plan import plan_windows

FIRST_CANDIDATE_SERIES = 0x100
"""Solver noise of continuation c of the K in search n is of the series FIRST_CANDIDATE_SERIES + n·K + c."""

_NO_SLOTS = np.empty(0, np.int64)


class Reflection:
    """Judges one group of latent frames per iteration and replaces the tail by the best of several continuations.

    State: `previous_score` C₀ (None before the first judgement) and `num_searches`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: MigaConfig,
        window_frames: int,
        stride: int,
        emit: Callable[..., None],
        anchor: np.ndarray = _NO_SLOTS,
        num_given: int = 0,
    ) -> None:
        self.denoiser = denoiser
        self.tail_noise = Tail(denoiser.store, denoiser.schedule, denoiser.noise, config.tail_signal)
        self.config = config
        self.judge = JUDGES[config.judge]
        self.window_frames = window_frames
        self.stride = stride
        self.commit_offset = config.commit_offset_of(window_frames)
        self.emit = emit
        self.anchor = anchor
        self.num_given = num_given
        self.previous_score: float | None = None
        self.num_searches = 0

    def after_pass(self, head: int, tail: int, then: Callable[[], None] = lambda: None) -> None:
        """Judge the queue of frames `head … tail − 1` after a pass, before anything is popped or pushed.

        `then` notes that it is done, as one with what it changes.
        """
        config, store = self.config, self.denoiser.store
        self.denoiser.forget_parts()
        width, apart = config.zigzag_width, config.passes_per_advance
        newest = int(store.step_index[store.slots([tail - 1])[0]])
        judged = range(tail - config.judge_step // apart * width, tail)[:width]
        first_reference = judged.start - config.reference_groups * width
        # Given frames are no noisier than clean, and what is like them is not for a search to replace.
        if newest != apart or first_reference < max(head, self.num_given):
            then()
            return
        reference = store.slots(range(first_reference, judged.start))
        score = float(self.judge(store, reference, store.slots(judged)[None], config)[0])
        self.emit("score", frame=judged.start, score=score, previous=self.previous_score)
        if self.previous_score is None or self.previous_score - score <= config.score_drop:
            with store.changing():
                self.previous_score = score
                then()
            return
        self._search(reference, head, judged.start, score, then)

    def _search(self, reference: np.ndarray, head: int, first: int, score: float, then: Callable[[], None]) -> None:
        """Try `candidates` continuations of the reference; C₀ becomes the score of the one that stays.

        A continuation ends with groups at steps judge_step … passes_per_advance, the shape of the queue from the judged
        group on. With `search_baseline` "continued" the last is of the noise that the judged frames were pushed with,
        and the others have to exceed its score: it too went on from references that stood still.
        """
        config, store = self.config, self.denoiser.store
        width, count = config.zigzag_width, config.num_continuations
        apart = config.passes_per_advance
        length = config.judge_step // apart * width
        numbers = np.arange(first, first + length)
        slots = np.stack([store.scratch_slots(c * length, length) for c in range(count)])  # [K, judge_step·Z]
        self.emit("search_started", frame=first, score=score, previous=self.previous_score, search=self.num_searches)
        for group in range(config.judge_step // apart):
            fresh = slice(group * width, (group + 1) * width)
            rows = store.prompt_row[store.slots(numbers[fresh])]
            for c in range(count):
                is_new = c < config.candidates
                purpose, series = (Purpose.CANDIDATE, self.num_searches * count + c) if is_new else (Purpose.PUSH, 0)
                noise = self.tail_noise(purpose, numbers[fresh], rows, head=head, series=series)
                store.put(slots[c, fresh], noise, step_index=0, numbers=numbers[fresh].tolist())
                store.prompt_row[slots[c, fresh]] = rows
            # A stochastic solver draws noise of its own for each candidate; otherwise all share one pass.
            shares = [slots[c : c + 1] for c in range(count)] if self.denoiser.schedule.uses_noise else [slots]
            for c, share in [*enumerate(shares)] * apart:
                series = FIRST_CANDIDATE_SERIES + self.num_searches * count + c
                self.denoiser.run(self._windows(reference, share[:, : fresh.stop]), noise_series=series)
        scores = self.judge(store, reference, slots[:, :width], config).tolist()
        baseline = scores.pop() if count > config.candidates else score
        best_score = max(scores)
        best, adopted = scores.index(best_score), best_score > baseline
        with store.changing():
            if adopted:
                store.copy(slots[best], store.slots(numbers))
            self.previous_score = best_score if adopted else score
            self.num_searches += 1
            then()
        self.emit(
            "search_finished",
            frame=first,
            search=self.num_searches - 1,
            scores=scores,
            score=score,
            baseline=baseline,
            adopted=adopted,
        )

    def _windows(self, reference: np.ndarray, candidates: np.ndarray) -> list[Window]:
        """Windows over (reference + candidate frames) of every candidate; reference and anchor are only read."""
        num_reference, num_anchors = len(reference), len(self.anchor)
        num_frames = num_reference + candidates.shape[1]
        window = self.window_frames - num_anchors
        phase = max(num_frames - window, 0) % self.stride
        prompt_row = self.denoiser.store.prompt_row
        windows = []
        for candidate in candidates:
            sequence = np.concatenate([reference, candidate])
            for start, commit_start, commit_stop in plan_windows(
                num_frames, window, self.stride, phase, offset=self.commit_offset
            ):
                first = max(commit_start, num_reference)
                if first >= commit_stop:
                    continue
                slots = sequence[start : start + window]
                is_of_its_prompt = num_anchors > 0 and (prompt_row[slots] == prompt_row[self.anchor[:1]]).all()
                anchor = self.anchor if is_of_its_prompt else _NO_SLOTS
                offset = len(anchor) - start
                first, num_past = first + offset, self.config.num_past(len(anchor), first + offset)
                windows.append(Window(np.concatenate([anchor, slots]), first, commit_stop + offset, num_past))
        return windows
