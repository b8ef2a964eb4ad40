"""Which windows cut one denoising pass: integers only, no tensors.

A pass advances every latent frame of a sequence by one step. The sequence is cut into windows of `window` latent
frames; each window reads all its frames and *commits* some of them, so that every frame is committed exactly once
(MIGA, arXiv 2605.18233, Algorithm 1; the cuts themselves follow the released code, whose plans the goldens hold).
"""

from __future__ import annotations

from collections.abc import Iterator

from miga_engine.errors import ConfigError


def next_cut(start: int, num_frames: int | None, window: int, stride: int, phase: int) -> int:
    """The frame where the window after that at `start` starts.

    Cuts are {0} ∪ {phase + i·stride ≤ n − window} ∪ {n − window}; behind the last window, at n − window, it is n.
    `num_frames` None is an endless sequence: no final cut ever falls.
    """
    steps = 0 if start < phase else (start - phase) // stride + 1
    cut = phase + steps * stride
    if num_frames is None:
        return cut
    last_start = max(num_frames - window, 0)
    if start >= last_start:
        return num_frames
    return min(cut, last_start)


def next_commit_stop(start: int, num_frames: int | None, window: int, stride: int, phase: int, offset: int = 0) -> int:
    """The frame where the window at `start` stops committing: `offset` behind the next cut, and the end at the end."""
    cut = next_cut(start, num_frames, window, stride, phase)
    return cut if cut == num_frames else cut + offset


def iter_windows(
    num_frames: int, window: int, stride: int, phase: int, offset: int = 0
) -> Iterator[tuple[int, int, int]]:
    """Lazily the windows `(start, commit_start, commit_stop)` of one pass, which commit from `offset` frames behind
    their start to `offset` frames behind the next: the first from 0 on, the last to the end."""
    committed = 0
    while committed < num_frames:
        start = max(committed - offset, 0)
        stop = next_commit_stop(start, num_frames, window, stride, phase, offset)
        yield start, committed, stop
        committed = stop


def plan_windows(
    num_frames: int, window: int, stride: int, phase: int = 0, commit: str = "leading", offset: int = 0
) -> list[tuple[int, int, int]]:
    """The windows of one pass over `num_frames` latent frames, as `(start, commit_start, commit_stop)`.

    `commit="leading"` (MIGA): window starts are 0, phase, phase + stride, … and finally `num_frames − window`; each
    commits up to the next start, the last one everything it reads. A sequence shorter than `window` is one window.
    With `offset` each leaves so many of its first frames to the window before it, and keeps as many more at its end:
    at `window − stride` it is the trailing end that is kept, at half of that the middle.

    `commit="trailing"` (FIFO-Diffusion's look-ahead denoising, arXiv 2405.11473 §4.3): the sequence begins with
    `window − stride` frames of padding that are only read; each window commits its last `stride` frames.

    Raises ConfigError where the numbers contradict each other.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames is {num_frames}: give at least 1 latent frame")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}: give a number between 1 and the window of {window} latent frames")
    if not 0 <= phase < stride:
        raise ConfigError(f"phase is {phase}: give a number between 0 and stride − 1 = {stride - 1}")
    if not 0 <= offset <= window - stride:
        raise ConfigError(f"offset is {offset}: give a number between 0 and window − stride = {window - stride}")
    if commit == "leading":
        return list(iter_windows(num_frames, window, stride, phase, offset))
    if commit != "trailing":
        raise ConfigError(f"commit is {commit!r}: give 'leading' or 'trailing'")
    padding = window - stride
    if num_frames <= padding:
        raise ConfigError(
            f"num_frames is {num_frames}: give more than the {padding} frames of padding of a trailing commit"
        )
    plan = []
    for commit_start in range(padding, num_frames, stride):
        commit_stop = min(commit_start + stride, num_frames)
        plan.append((max(0, commit_stop - window), commit_start, commit_stop))
    return plan


def guidance_indices(
    start: int, guidance_frames: int, zigzag_width: int, offset: int | None = None, spacing: int = 1
) -> list[int]:
    """Long-range frame guidance: which earlier frames a window that starts at `start` reads, ascending (§2).

    `start − (offset + j·spacing·zigzag_width)`: one frame in each `spacing` level groups before the window, the nearest
    at `offset`, ⌊zigzag_width/2⌋ unless given. Where the sequence does not reach so far back they move together, the
    nearest staying where it is; where it has not even `guidance_frames` groups, or `offset`, they are spread evenly
    over what there is; none where fewer than `guidance_frames` frames precede the window.
    """
    m = guidance_frames
    if m == 0 or start < m:
        return []
    first = max(1, zigzag_width // 2) if offset is None else offset
    if start >= m * zigzag_width and start - first >= m - 1:
        apart = min(spacing * zigzag_width, (start - first) // max(m - 1, 1))
    else:
        first = apart = start // m
    return [start - first - j * apart for j in range(m - 1, -1, -1)]
