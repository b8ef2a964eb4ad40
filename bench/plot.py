"""Pictures of what bench_kernels.py measured: `python bench/plot.py bench/results/kernels_cpu.csv [PICTURE.png]`.

Left: each op's newest row, as a share of the machine's ceiling in the same run. Right: how many times faster it is than
its rivals there. Needs matplotlib (`pip install "miga_engine[bench]"`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

RIVALS = {"x_eager": ("eager PyTorch", "#9aa5b1"), "x_compiled": ("torch.compile", "#4f7cac")}
RIVALS["x_loop"] = ("loop over frames", "#d9a05b")
UNITS = {"GB/s": ("memory: copy", "#3f8f6b"), "TFLOP/s": ("matmul", "#7a4f9a")}


def newest(path: Path) -> list[dict[str, str]]:
    """The last row of each op, shape and dtype, ours only, in the order of the file."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["implementation"] == "op"]
    return list({(row["op"], row["shape"], row["dtype"]): row for row in rows}.values())


def draw(rows: list[dict[str, str]], picture: Path) -> None:
    names = [f"{row['op']}  {row['dtype']}" for row in rows]
    places = range(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.6 + 0.42 * len(rows)), sharey=True)
    for unit, (label, colour) in UNITS.items():
        chosen = [i for i in places if rows[i]["unit"] == unit]
        shares = [100 * float(rows[i]["of_ceiling"]) for i in chosen]
        bars = left.barh(chosen, shares, color=colour, label=f"{label} ceiling")
        left.bar_label(bars, [f"{float(rows[i]['rate']):.3g} {unit}" for i in chosen], padding=3, fontsize=8)
    left.axvline(100, color="#444", linewidth=0.8)
    left.set_xlim(0, 1.25 * max([100, *(100 * float(row["of_ceiling"]) for row in rows)]))
    left.set_xlabel("% of the ceiling measured in the same run")
    left.set_yticks(places, names)
    left.invert_yaxis()
    for offset, (key, (label, colour)) in zip((-0.24, 0, 0.24), RIVALS.items(), strict=True):
        chosen = [(float(row[key]), i + offset) for i, row in enumerate(rows) if row[key]]
        right.plot(*zip(*chosen, strict=True), "o", color=colour, label=label, markersize=5)
        for value, place in chosen:
            right.annotate(f"{value:.3g}×", (value, place), xytext=(6, -3), textcoords="offset points", fontsize=7)
    right.axvline(1, color="#444", linewidth=0.8)
    right.set_xscale("log")
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.margins(x=0.15)
    right.set_xlabel("times faster than")
    for axes in (left, right):
        axes.grid(axis="x", color="#ddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    last = rows[-1]
    figure.suptitle(f"{last['device']}, torch {last['torch']}, commit {last['commit']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="CSV file that bench_kernels.py wrote")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG file (default: beside the CSV)")
    options = parser.parse_args()
    rows = newest(options.results) if options.results.is_file() else []
    if not rows:
        parser.error(f"{options.results} holds no measured rows: run bench/bench_kernels.py first")
    picture = options.picture or options.results.with_suffix(".png")
    draw(rows, picture)
    print(picture)


if __name__ == "__main__":
    main()
