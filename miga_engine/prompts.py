"""Prompts over time: which text embedding each latent frame is given (ALGORITHM §7)."""

from __future__ import annotations

import reprlib
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch.nn.functional import pad

from miga_engine.errors import ConfigError

MAX_PROMPT_CHARS = 10_000  # several times what any text encoder reads
MAX_PROMPTS = 1000
MAX_FRAME = 10**9  # two years of video


def check_prompt(prompt: str | Mapping[int, str]) -> dict[int, str]:
    """A text or a timeline ``{first video frame: text}`` as a timeline in order. Raises ConfigError."""
    timeline = {0: prompt} if isinstance(prompt, str) else prompt
    if not isinstance(timeline, Mapping):
        raise ConfigError(f"prompt must be a text or a timeline {{first_frame: text}}, got {type(prompt).__name__}")
    if len(timeline) > MAX_PROMPTS:
        raise ConfigError(f"a prompt timeline may have {MAX_PROMPTS} entries, got {len(timeline)}")
    for frame, text in timeline.items():
        if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
            raise ConfigError(f"a prompt timeline's keys are video frame numbers from 0 on, got {reprlib.repr(frame)}")
        if frame > MAX_FRAME:
            raise ConfigError(f"a prompt timeline may reach frame {MAX_FRAME}, got {reprlib.repr(frame)}")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"the prompt is empty at frame {frame}: describe the video in a few words")
        check_text(f"the prompt at frame {frame}", text)
    if 0 not in timeline:
        raise ConfigError(f"a prompt timeline must start at frame 0, got frames {reprlib.repr(sorted(timeline))}")
    return {frame: timeline[frame] for frame in sorted(timeline)}


def check_text(name: str, text: object) -> None:
    """ConfigError unless `text` is a text that a tokenizer can be given; it may be empty."""
    if not isinstance(text, str):
        raise ConfigError(f"{name} must be a text, got {type(text).__name__}")
    if len(text) > MAX_PROMPT_CHARS:
        raise ConfigError(f"{name} has {len(text)} characters: shorten it to {MAX_PROMPT_CHARS}")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
            raise ConfigError(f"{name} holds {character!a}, which is no character of a text: leave it out")


class PromptTimeline:
    """Maps latent frames to rows of a table of text embeddings: row 0 is the negative prompt, row 1 the first prompt.

    A prompt holds from its first video frame on; over ``blend_frames`` video frames after a change the embedding runs
    linearly from the old text to the new one, in one row per latent frame concerned.

    Args:
        prompts: ``{first video frame: text}``, containing frame 0.
        blend_frames: 0 = a hard cut.
        first_video_frame: maps a latent frame number to the first video frame it decodes to.
    """

    def __init__(self, prompts: Mapping[int, str], blend_frames: int, first_video_frame: Callable[[int], int]) -> None:
        self.starts = sorted(prompts)
        self.texts = [prompts[start] for start in self.starts]
        self.blend_frames = blend_frames
        self.first_video_frame = first_video_frame
        self._blends: list[tuple[int, int]] = []
        for entry, start in enumerate(self.starts[1:], 1):
            stop = min([start + blend_frames, *self.starts[entry + 1 : entry + 2]])
            first = bisect_left(range(start), start, key=first_video_frame)
            for frame in map(first_video_frame, count(first)):
                if frame >= stop:
                    break
                self._blends.append((entry, frame - start + 1))
        self._blend_rows = {key: 1 + len(self.starts) + i for i, key in enumerate(self._blends)}

    def row(self, latent_frame: int) -> int:
        """Row of the embedding that this latent frame is denoised with."""
        frame = self.first_video_frame(latent_frame)
        entry = bisect_right(self.starts, frame) - 1
        return self._blend_rows.get((entry, frame - self.starts[entry] + 1), 1 + entry)

    def contexts(self, negative_prompt: str, encode: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
        """The table ``[rows, T, D]``, zero rows behind each text. Each text is encoded alone, so that the embedding of
        one does not depend on its neighbours."""
        texts = [encode([text])[0] for text in (negative_prompt, *self.texts)]
        length = max(len(text) for text in texts)
        table = [pad(text, (0, 0, 0, length - len(text))) for text in texts]
        for entry, position in self._blends:
            weight = position / (self.blend_frames + 1)
            table.append(torch.lerp(table[entry], table[entry + 1], weight))
        return torch.stack(table)
