"""Prompts over time: which text embedding each latent frame is given (docs/method.md §7)."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from miga_engine.config import MAX_FRAME
from miga_engine.errors import ConfigError

MAX_PROMPT_CHARS = 10_000  # several times what any text encoder reads
MAX_PROMPTS = 1000
FRAME_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
"""A video frame as the keys of a timeline in JSON have it, which are texts."""
MAX_CHANGES = 10_000
"""Of a stream while it goes on."""


def check_prompt(prompt: str | Mapping[int, str]) -> dict[int, str]:
    """A text or a timeline `{first video frame: text}` as a timeline in order. Raises ConfigError."""
    timeline = {0: prompt} if isinstance(prompt, str) else prompt
    if not isinstance(timeline, Mapping):
        raise ConfigError(f"prompt is of type {type(prompt).__name__}: give a text or a timeline {{first_frame: text}}")
    if len(timeline) > MAX_PROMPTS:
        raise ConfigError(f"the prompt timeline has {len(timeline)} entries: give at most {MAX_PROMPTS}")
    for frame, text in timeline.items():
        if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
            raise ConfigError(
                f"the prompt timeline has the key {reprlib.repr(frame)}: give video frame numbers from 0 on"
            )
        if frame > MAX_FRAME:
            raise ConfigError(f"the prompt timeline reaches frame {reprlib.repr(frame)}: give frames up to {MAX_FRAME}")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"the prompt is empty at frame {frame}: describe the video in a few words")
        check_text(f"the prompt at frame {frame}", text)
    if 0 not in timeline:
        raise ConfigError(
            f"the prompt timeline has frames {reprlib.repr(sorted(timeline))}: give a text for frame 0, too"
        )
    return {frame: timeline[frame] for frame in sorted(timeline)}


def check_text(name: str, text: object) -> None:
    """ConfigError unless `text` is a text that a tokenizer can be given; it may be empty."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} is of type {type(text).__name__}: give a text")
    if len(text) > MAX_PROMPT_CHARS:
        raise ConfigError(f"{name} has {len(text)} characters: shorten it to {MAX_PROMPT_CHARS}")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
            raise ConfigError(f"{name} holds {character!a}, which is no character of a text: leave it out")


class PromptTimeline:
    """Maps latent frames to rows of text embeddings: row 0 is the negative prompt, row 1 the first prompt.

    A prompt holds from its first video frame on; over `blend_frames` video frames after a change the embedding runs
    linearly from the old text to the new one, in one row per latent frame concerned. What is held does not grow with
    the blends.

    prompts: `{first video frame: text}`, containing frame 0.
    blend_frames: 0 = a hard cut; of all prompts, or of each by its first video frame.
    first_video_frame: maps a latent frame number to the first video frame it decodes to.
    """

    def __init__(
        self,
        prompts: Mapping[int, str],
        blend_frames: int | Mapping[int, int],
        first_video_frame: Callable[[int], int],
    ) -> None:
        self.starts = sorted(prompts)
        self.texts = [prompts[start] for start in self.starts]
        blends = dict.fromkeys(self.starts, blend_frames) if isinstance(blend_frames, int) else dict(blend_frames)
        self._blends = blends
        self.first_video_frame = first_video_frame
        self._changes = [_Change(0, 0, 1 + len(self.starts))]
        for entry, start in enumerate(self.starts[1:], 1):
            stop = min([start + self._blends[start], *self.starts[entry + 1 : entry + 2]])
            first = self.first_latent(start)
            num_blends = bisect_left(range(first, first + stop - start), stop, key=first_video_frame)
            before = self._changes[-1]
            self._changes.append(_Change(first, num_blends, before.first_row + before.num_blends))

    def first_latent(self, frame: int) -> int:
        """The first latent frame that decodes to none before this video frame."""
        return bisect_left(range(frame), frame, key=self.first_video_frame)

    def changed(self, entries: Iterable[tuple[int, str, int]]) -> PromptTimeline:
        """The timeline with these (first video frame, text, blend_frames), each in place of one that begins then."""
        prompts, blends = dict(zip(self.starts, self.texts, strict=True)), dict(self._blends)
        for start, text, blend_frames in entries:
            prompts[start], blends[start] = text, blend_frames
        return PromptTimeline(prompts, blends, self.first_video_frame)

    def texts_from(self, frame: int) -> list[str]:
        """The texts that video frames from this one on are shown."""
        return self.texts[max(bisect_right(self.starts, frame) - 2, 0) :]  # of a blend, two

    @property
    def settled(self) -> list[int]:
        """The first video frame of each prompt that shows nothing of the one before it."""
        return [start + self._blends[start] if start else 0 for start in self.starts]

    def prompt_row(self, latent_frame: int) -> int:
        """Row of the embedding that this latent frame is denoised with."""
        entry = bisect_right(self.starts, self.first_video_frame(latent_frame)) - 1
        change = self._changes[entry]
        position = latent_frame - change.first_latent
        return change.first_row + position if position < change.num_blends else 1 + entry

    def most_prompt_rows(self, num_latents: int) -> int:
        """The most rows that so many latent frames in a row can name."""
        most, end, rows = 0, 0, 0
        for change in self._changes:  # those that begin within num_latents of this one, and the prompt before it
            while end < len(self._changes) and self._changes[end].first_latent < change.first_latent + num_latents:
                rows += 1 + self._changes[end].num_blends
                end += 1
            most = max(most, rows + 1)
            rows -= 1 + change.num_blends
        return min(most, num_latents, len(self.starts) + sum(change.num_blends for change in self._changes))

    def encode(self, negative_prompt: str, encode: Callable[[list[str]], Tensor]) -> PromptEmbeddings:
        """The rows themselves. Each text is encoded alone, so that the embedding of one does not depend on others."""
        texts = {text: _kept(encode([text])[0]) for text in dict.fromkeys((negative_prompt, *self.texts))}
        return PromptEmbeddings(self, negative_prompt, texts)

    def blend(self, prompt_row: int) -> tuple[int, float] | None:
        """Of a row between two prompts: (row of the earlier one, share of the later); None of another."""
        entry = bisect_right(self._changes, prompt_row, key=lambda change: change.first_row) - 1
        change = self._changes[entry]
        if prompt_row < self._changes[0].first_row:
            return None
        frame = self.first_video_frame(change.first_latent + prompt_row - change.first_row)
        start = self.starts[entry]
        return entry, (frame - start + 1) / (self._blends[start] + 1)

    def __len__(self) -> int:
        """Rows there are."""
        return self._changes[-1].first_row + self._changes[-1].num_blends


class _Change(NamedTuple):
    """Where a prompt begins: its first latent frame, how many of these are blended, the row of the first of them."""

    first_latent: int
    num_blends: int
    first_row: int


class PromptEmbeddings:
    """Text embeddings `[T,D]` by row of a timeline, held on the host and blended when they are asked for."""

    def __init__(
        self, timeline: PromptTimeline, negative_prompt: str, texts: Mapping[str, Tensor], num_tokens: int = 0
    ) -> None:
        self.timeline = timeline
        self._negative_prompt = negative_prompt
        self._texts = texts
        self.num_tokens = max([num_tokens, *map(len, texts.values())])
        """T of the longest text there has been."""

    def changed(
        self, entries: Sequence[tuple[int, str, int]], encode: Callable[[list[str]], Tensor], first_frame: int
    ) -> PromptEmbeddings:
        """The rows of the timeline with these entries, see `PromptTimeline.changed`, from a video frame on: those
        before it are not held. Texts that are known are not encoded again."""
        timeline = self.timeline.changed(entries)
        texts, num_tokens = dict(self._texts), self.num_tokens
        wanted = {self._negative_prompt, *timeline.texts_from(first_frame)}
        for text in dict.fromkeys(text for _, text, _ in entries if text not in texts):
            encoded = _kept(encode([text])[0])
            num_tokens = max(num_tokens, len(encoded))
            if text in wanted:
                texts[text] = encoded
        held = {text: texts[text] for text in texts if text in wanted}
        return PromptEmbeddings(timeline, self._negative_prompt, held, num_tokens)

    def __len__(self) -> int:
        return len(self.timeline)

    def __getitem__(self, prompt_row: int) -> Tensor:
        if not 0 <= prompt_row < len(self):
            raise IndexError(f"there is no text of prompt row {prompt_row}, only of {len(self)}")
        blend = self.timeline.blend(prompt_row)
        if blend is None:
            return self._texts[self.timeline.texts[prompt_row - 1] if prompt_row else self._negative_prompt]
        earlier, share = blend
        texts = [self._texts[name] for name in self.timeline.texts[earlier - 1 : earlier + 1]]
        length = max(map(len, texts))
        old, new = (pad(text, (0, 0, 0, length - len(text))) for text in texts)
        return torch.lerp(old, new, share)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))


def _kept(text: Tensor) -> Tensor:
    """An embedding as it is held; of shapes alone nothing can be fetched, and nothing need be."""
    return torch.empty_like(text, device="cpu") if text.is_meta else text.cpu()
