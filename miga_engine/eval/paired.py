"""Methods compared over the prompts and seeds they share: paired differences, their intervals, table and picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import ConfigError

MEASURES: Mapping[str, tuple[str, float]] = {
    "subject_consistency": ("subject consistency, %", 100),
    "background_consistency": ("background consistency, %", 100),
    "motion": ("motion, px/frame", 1),
    "colour_profile_distance": ("colours off the true world, %", 100),
    "colour_drift": ("colour drift, %", 100),
    "subject_jitter": ("subject jitter, px/frame²", 1),
    "accuracy": ("attributes as asked, %", 100),
}
"""Measures of the table: their name there, and the factor to its unit."""
REFERENCE = "fifo"
"""What the others are compared with."""
Row = Mapping[str, Any]


def paired_difference(
    rows: Sequence[Row], reference: Sequence[Row], measure: str, *, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference over the prompts and seeds that both have, and its 95 % interval (percentile bootstrap).

    Prompts are resampled whole, with all their seeds: videos of one prompt are not independent of each other.
    """
    values = {(row["prompt_index"], row["seed"]): row[measure] for row in reference}
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        key = (row["prompt_index"], row["seed"])
        if key in values:
            by_prompt.setdefault(row["prompt_index"], []).append(row[measure] - values[key])
    if not by_prompt:
        raise ConfigError("no prompt and seed is common to the two methods: there is nothing to compare")
    sums = np.array([sum(differences) for differences in by_prompt.values()])
    counts = np.array([len(differences) for differences in by_prompt.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def markdown_table(rows: Sequence[Row]) -> str:
    """A row per method: cost, and every measure as mean ± standard deviation over videos with its difference to FIFO.

    Differences whose 95 % interval excludes 0 are bold.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    reference = by_method.get(REFERENCE)
    titles = ["method", "videos", "latent frames read per frame", *(title for title, _ in MEASURES.values())]
    lines = ["| " + " | ".join(titles) + " |", "| --- " + "| ---: " * (len(titles) - 1) + "|"]
    for method, own in by_method.items():
        cells = [
            f"`{method}`",
            str(len(own)),
            f"{np.mean([row['window_frames'] / row['num_frames'] for row in own]):.1f}",
        ]
        for measure, (_, factor) in MEASURES.items():
            values = np.array([row[measure] for row in own]) * factor
            cell = f"{values.mean():.2f} ± {values.std():.2f}"
            if reference and method != REFERENCE:
                mean, low, high = (factor * x for x in paired_difference(own, reference, measure))
                mark = "**" if low * high > 0 else ""
                cell += f"<br>{mark}{mean:+.2f}{mark} [{low:+.2f}, {high:+.2f}]"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pyplot() -> Any:
    """matplotlib.pyplot without a window."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "miga_engine[bench]", or leave them out') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_measures(rows: Sequence[Row], picture: Path) -> None:
    """Consistency against motion, side by side for subject and background, and each against cost: means with the
    95 % interval of their difference to FIFO."""
    plt = pyplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    shown = ("subject_consistency", "background_consistency", "colour_profile_distance", "subject_jitter")
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 5.2), layout="constrained")
    for axis, measure in zip(axes, shown, strict=True):
        title, factor = MEASURES[measure]
        for i, (method, own) in enumerate(by_method.items()):
            x, y = (np.mean([row[name] for row in own]) for name in ("motion", measure))
            errors = np.zeros((2, 2))  # of x and y, below and above
            if method != REFERENCE and REFERENCE in by_method:
                intervals = [paired_difference(own, by_method[REFERENCE], name) for name in ("motion", measure)]
                errors = np.array([[mean - low, high - mean] for mean, low, high in intervals])
            axis.errorbar(
                x, y * factor, xerr=errors[0][:, None], yerr=factor * errors[1][:, None],
                marker="*" if method == REFERENCE else "os^Dvp"[i % 6], markersize=14 if method == REFERENCE else 7,
                color=plt.get_cmap("tab20")(i % 20), elinewidth=0.8, linestyle="none", label=method,
            )  # fmt: skip
        axis.set(xlabel="motion, px/frame", title=title)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("Consistency beside motion; bars: 95 % intervals of the paired difference to FIFO (star)")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
