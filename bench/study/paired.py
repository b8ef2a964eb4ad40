"""Methods compared over the prompts and seeds they share: paired differences, their intervals, table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from miga_engine.errors import ConfigError
from miga_engine.files import written_whole

COMPARED: Mapping[str, tuple[str, float]] = {
    "subject_consistency": ("subject consistency, %", 100),
    "background_consistency": ("background consistency, %", 100),
    "motion": ("motion, px/frame", 1),
    "colour_profile_distance": ("colours off the true world, %", 100),
    "colour_drift": ("colour drift, %", 100),
    "subject_jitter": ("subject jitter, px/frame²", 1),
    "accuracy": ("attributes as asked, %", 100),
    "kept": ("left open, and kept, %", 100),
}
"""Measures of the table: their name there, and the factor to its unit; NaN where a video has none."""
VideoRow = Mapping[str, Any]
"""A row of the ablation's CSV file: what one video was made with, and its measures."""


def paired_difference(
    rows: Sequence[VideoRow], reference: Sequence[VideoRow], measure: str, *, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference over the prompts and seeds that both have, and its 95 % interval (percentile bootstrap).

    Prompts are resampled whole, with all their seeds: videos of one prompt are not independent of each other.
    """
    values = {_video(row): row[measure] for row in reference}
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        if _video(row) in values and not np.isnan(row[measure] - values[_video(row)]):
            by_prompt.setdefault(row["prompt_index"], []).append(row[measure] - values[_video(row)])
    if not by_prompt:
        raise ConfigError("no prompt and seed is common to the two methods: compare methods that share some")
    sums = np.array([sum(differences) for differences in by_prompt.values()])
    counts = np.array([len(differences) for differences in by_prompt.values()])
    return resampled_ratio(sums, counts, num_resamples)


def resampled_ratio(
    sums: npt.ArrayLike, counts: npt.ArrayLike, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """Σ sums / Σ counts over groups, and its 95 % interval by drawing whole groups (percentile bootstrap).

    Draws in which nothing is counted say nothing.
    """
    sums, counts = np.asarray(sums), np.asarray(counts)
    drawn = np.random.default_rng(0).integers(len(sums), size=(num_resamples, len(sums)))
    totals = counts[drawn].sum(1)
    ratios = sums[drawn].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def _by_method(rows: Sequence[VideoRow]) -> dict[str, list[VideoRow]]:
    methods = dict.fromkeys(row["method"] for row in rows)
    return {method: [row for row in rows if row["method"] == method] for method in methods}


def _compared(rows: Sequence[VideoRow]) -> list[str]:
    """Measures that some video has."""
    return [name for name in COMPARED if not all(np.isnan(row[name]) for row in rows)]


def markdown_table(rows: Sequence[VideoRow], reference: str) -> str:
    """A row per method: cost, and every measure as mean ± standard deviation over videos, below it the mean difference
    to the method `reference` over the videos of common prompts and seeds.

    Differences whose 95 % interval excludes 0 are bold. Without rows of the reference there are none.
    """
    by_method = _by_method(rows)
    compared = by_method.get(reference, [])
    measures = _compared(rows)
    titles = ["method", "videos", "latent frames read per frame", *(COMPARED[name][0] for name in measures)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " + "| ---: " * (len(titles) - 1) + "|"]
    for method, own in by_method.items():
        cells = [
            f"`{method}`",
            str(len(own)),
            f"{np.mean([row['window_frames'] / row['num_frames'] for row in own]):.1f}",
        ]
        for measure in measures:
            values = np.array([row[measure] for row in own]) * COMPARED[measure][1]
            cell = f"{np.nanmean(values):.2f} ± {np.nanstd(values):.2f}"
            if compared and method != reference:
                cell += f"<br>{_difference(own, compared, measure)}"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parts_table(rows: Sequence[VideoRow], parts: Sequence[tuple[str, str, str]]) -> str:
    """A row per part (its name, the method with it, the same without): what the part changes in cost and measures.

    Means over the videos of common prompts and seeds, as in `markdown_table`; parts without any are left out, and the
    table is empty where none is left.
    """
    by_method, measures = _by_method(rows), _compared(rows)
    lines = []
    for name, method, without in parts:
        pairs = [{_video(row): row for row in by_method.get(side, ())} for side in (method, without)]
        both = sorted(pairs[0].keys() & pairs[1].keys())
        if not both:
            continue
        own, other = ([side[video] for video in both] for side in pairs)
        calls, before = (sum(row["window_frames"] for row in side) for side in (own, other))
        cost = f"{100 * (calls / before - 1):+.0f} %" if before else ""
        cells = [name, f"`{method}` less `{without}`", str(len(both)), cost]
        lines.append("| " + " | ".join(cells + [_difference(own, other, measure) for measure in measures]) + " |")
    if not lines:
        return ""
    titles = ["part", "difference", "videos", "latent frames read", *(COMPARED[name][0] for name in measures)]
    head = ["| " + " | ".join(titles) + " |", "| --- | --- " + "| ---: " * (len(titles) - 2) + "|"]
    return "\n".join(head + lines) + "\n"


def _video(row: VideoRow) -> tuple[int, int]:
    return row["prompt_index"], row["seed"]


def _difference(rows: Sequence[VideoRow], reference: Sequence[VideoRow], measure: str) -> str:
    """Mean difference in the measure's unit and its interval, bold where that excludes 0."""
    mean, low, high = (COMPARED[measure][1] * x for x in paired_difference(rows, reference, measure))
    mark = "**" if low * high > 0 else ""
    return f"{mark}{mean:+.2f}{mark} [{low:+.2f}, {high:+.2f}]"


def pyplot() -> Any:
    """matplotlib.pyplot without a window."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "miga_engine[bench]", or leave them out') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, picture: Path) -> None:
    """Write a figure in the format that the name tells, whole or not at all."""
    with written_whole(picture) as file:
        figure.savefig(file, dpi=110, format=picture.suffix[1:] or "png")


def draw_measures(rows: Sequence[VideoRow], reference: str, picture: Path) -> None:
    """What each method differs by from `reference` in four measures, beside what it differs by in motion: means over
    common prompts and seeds with their 95 % intervals. Raises ConfigError without rows of the reference."""
    plt = pyplot()
    by_method = _by_method(rows)
    if reference not in by_method:
        raise ConfigError(f"pictures compare with {reference!r}, of which there is no video: name it in --methods")
    compared = by_method.pop(reference)
    wanted = ("kept", "subject_consistency", "background_consistency", "colour_profile_distance", "subject_jitter")
    shown = [measure for measure in wanted if measure in _compared(rows)][:4]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 5.2), layout="constrained")
    for axis, measure in zip(axes, shown, strict=True):
        title, factor = COMPARED[measure]
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.plot(0, 0, "k*", markersize=14, label=reference)
        for i, (method, own) in enumerate(by_method.items()):
            (x, *across), (y, *up) = (paired_difference(own, compared, name) for name in ("motion", measure))
            axis.errorbar(
                x, y * factor, xerr=[[x - across[0]], [across[1] - x]],
                yerr=[[factor * (y - up[0])], [factor * (up[1] - y)]], marker="os^Dvp"[i % 6], markersize=7,
                color=plt.get_cmap("tab20")(i % 20), elinewidth=0.8, linestyle="none", label=f"{method} ({len(own)})",
            )  # fmt: skip
        axis.set(xlabel="motion, px/frame", title=title)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Differences to {reference}, measure beside motion, with 95 % intervals (number of videos)")
    save_figure(figure, picture)
    plt.close(figure)
