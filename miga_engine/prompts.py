"""Prompts over time: which text embedding each latent frame is given (ALGORITHM §7)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import count, takewhile

import torch
from torch.nn.functional import pad


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
        last = max((start + blend_frames for start in self.starts[1:]), default=0)
        latent_starts = takewhile(lambda frame: frame < last, map(first_video_frame, count()))
        entries = ((bisect_right(self.starts, frame) - 1, frame) for frame in latent_starts)
        self._blends = [
            (entry, frame - self.starts[entry] + 1)
            for entry, frame in entries
            if entry > 0 and frame < self.starts[entry] + blend_frames
        ]
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
