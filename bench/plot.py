"""Pictures of what was measured: `python bench/plot.py bench/results/kernels_cpu.csv [PICTURE.png]` or `... engine`.

Of bench_kernels.py. Left: each op's newest row, as a share of the machine's ceiling in the same run. Right: how many
times faster it is than its rivals there. Of the engine (docs/bench.png): frames a second beside a plain diffusers loop,
where the time goes, the network alone at published widths, memory over length. The newest rows count, those of a GPU
where there are some. Needs matplotlib (`pip install "miga_engine[bench]"`).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib
import result_files

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
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


DOCS = Path(__file__).parent.parent / "docs"
INK, FAINT = "#27313b", "#8a96a3"
CONTENDERS = {
    "op auto": ("engine", "#2f6f9f"),
    "op": ("engine with SDPA", "#7db0d5"),
    "compiled": ("diffusers, torch.compile", "#9aa5b1"),
    "eager": ("diffusers, eager", "#cfd6dd"),
}
PARTS = {
    "network": ("network", "#2f6f9f"),
    "decode": ("decode", "#3f8f6b"),
    "sampler": ("sampler", "#d9a05b"),
    "score": ("score", "#7a4f9a"),
    "rest": ("bookkeeping", "#c2543d"),
}
SPEED = {"engine": ("engine", "#2f6f9f"), "diffusers": ("plain diffusers loop", "#cfd6dd")}


def _newest_of(results: Path, kind: str, *keys: str) -> tuple[list[dict[str, str]], str]:
    """The newest rows of a GPU, else of a CPU, and what they were measured on."""
    for device in ("cuda", "cpu"):
        if rows := result_files.newest(results / f"{kind}_{device}.csv", *keys):
            last = rows[-1]
            threads = f", {last['threads']} thread" if last["threads"] else ""
            return rows, f"{last['device']}{threads}, torch {last['torch']}, {last['commit']}"
    return [], ""


def _speed(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Frames a second, the engine beside the loop, by dtype."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for offset, (name, (label, colour)) in zip((-0.19, 0.19), SPEED.items(), strict=True):
        chosen = [row for row in rows if row["implementation"] == name]
        speeds = [float(row["video_frames_per_s"]) for row in chosen]
        bars = axes.barh([dtypes.index(row["dtype"]) + offset for row in chosen], speeds, 0.34, color=colour)
        ratios = [
            f"   {float(row['x_baseline']):.2f}×" if name == "engine" and row["x_baseline"] else "" for row in chosen
        ]
        texts = [f"{speed:.3g}{ratio}" for speed, ratio in zip(speeds, ratios, strict=True)]
        axes.bar_label(bars, texts, padding=5, fontsize=10, color=INK)
        bars.set_label(label)
    axes.set_yticks(range(len(dtypes)), dtypes)
    axes.invert_yaxis()
    axes.margins(x=0.24)
    axes.set_xlabel(f"video frames a second over {rows[0]['request']}, and how many times the loop's")
    _legend(axes, 2)


def _shares(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Where the time of a run goes."""
    names = [f"{SPEED[row['implementation']][0].removeprefix('plain ')}\n{row['dtype']}" for row in rows]
    left = [0.0] * len(rows)
    for part, (label, colour) in PARTS.items():
        widths = [100 * max(0.0, float(row[part])) for row in rows]
        bars = axes.barh(range(len(rows)), widths, 0.62, left=left, color=colour, label=label)
        texts = [f"{width:.0f} %" if width >= 6 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", color="white", fontsize=9)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        text = f"bookkeeping {100 * float(row['rest']):.1f} %"
        axes.text(left[place] + 1.5, place, text, va="center", fontsize=9, color=PARTS["rest"][1])
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("% of the time of a run")
    _legend(axes, 5)


def _forward(axes: Axes, rows: list[dict[str, str]]) -> None:
    """The network alone, as a share of the matmul rate, with how much faster it is than its rivals."""
    groups = list(dict.fromkeys((row["op"], row["dtype"]) for row in rows))
    present = [name for name in CONTENDERS if any(row["implementation"] == name for row in rows)]
    for i, name in enumerate(present):
        label, colour = CONTENDERS[name]
        chosen = [row for row in rows if row["implementation"] == name]
        places = [groups.index((row["op"], row["dtype"])) + 0.2 * (i - (len(present) - 1) / 2) for row in chosen]
        bars = axes.barh(places, [100 * float(row["of_ceiling"]) for row in chosen], 0.18, color=colour, label=label)
        texts = [f"{float(row['min_ms']):.4g} ms" for row in chosen]
        if name.startswith("op"):
            texts = [text + _ratios(row) for text, row in zip(texts, chosen, strict=True)]
        axes.bar_label(bars, texts, padding=5, fontsize=9, color=INK)
    axes.set_yticks(range(len(groups)), [f"Wan {op.removeprefix('forward ')}\n{dtype}" for op, dtype in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 160)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("% of the matmul rate in the same run, and how many times as fast as diffusers eager · compiled")
    _legend(axes, 4)


def _ratios(row: dict[str, str]) -> str:
    values = [f"{float(row[key]):.2f}×" for key in ("x_eager", "x_compiled") if row[key]]
    return "   " + " · ".join(values) if values else ""


def _memory(axes: Axes, rows: list[dict[str, str]], column: str) -> None:
    """Peak and what is in use, over the length."""
    lengths = [int(row["latent_frames"]) for row in rows]
    for key, label, colour in (
        (column, "peak", CONTENDERS["op auto"][1]),
        ("in_use_mib", "of it in use by malloc", PARTS["decode"][1]),
    ):
        chosen = [(length, float(row[key])) for length, row in zip(lengths, rows, strict=True) if row[key]]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "o-", color=colour, label=label, linewidth=2, markersize=6)
            for length, value in chosen:
                axes.annotate(
                    f"{value:.0f}", (length, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9
                )
    axes.set_ylim(0, 1.25 * max(float(row[column]) for row in rows))
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel("latent frames made")
    axes.set_ylabel("MiB")
    _legend(axes, 2)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, handlelength=1.1,
        columnspacing=1.2,
    )  # fmt: skip


def draw_engine(results: Path, picture: Path) -> None:
    """Whatever has rows of speed, shares, forward and memory, two in a line. Raises ValueError where nothing has."""
    runs, run_device = _newest_of(results, "engine", "what", "model", "dtype", "implementation")
    runs = [row for row in runs if row["what"] == "generate"]
    forward, forward_device = _newest_of(results, "forward", "op", "dtype", "implementation")
    memory, memory_device = _newest_of(results, "memory", "model", "latent_frames")
    memory = sorted((row for row in memory if row["model"] == "narrow"), key=lambda row: int(row["latent_frames"]))
    column = "allocated_mib" if any(row["allocated_mib"] for row in memory) else "peak_mib"
    if forward:
        block_counts = {row["op"].removeprefix("forward "): row["shape"].partition(",")[0] for row in forward}
        sizes = ", ".join(f"{blocks} of {name}" for name, blocks in block_counts.items())
        network = f"The network alone: {sizes.replace('1 blocks', 'one block')}"
    panels: list[tuple[str, str, Callable[[Axes], None]]] = []
    if runs:
        panels.append(("A whole video", run_device, lambda axes: _speed(axes, runs)))
        panels.append(("Where the time goes", run_device, lambda axes: _shares(axes, runs)))
    if forward:
        panels.append((network, forward_device, lambda axes: _forward(axes, forward)))
    if memory:
        panels.append(("Memory over length", memory_device, lambda axes: _memory(axes, memory, column)))
    if not panels:
        raise ValueError(f"{results} holds no rows of the engine: run bench/bench_engine.py first")
    style = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}
    with plt.rc_context({**style, "font.size": 10}):
        num_lines = (len(panels) + 1) // 2
        figure, grid = plt.subplots(num_lines, 2, figsize=(13.5, 4.7 * num_lines), squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, device, draw_panel) in zip(grid.flat, panels, strict=False):
            draw_panel(axes)
            axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=30)
            if len({device for _, device, _ in panels}) > 1:
                axes.text(1, 1.11, device, transform=axes.transAxes, fontsize=8, color=FAINT, ha="right")
            axes.grid(axis="y" if axes.get_ylabel() else "x", color="#e6eaee", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0)
        if len({device for _, device, _ in panels}) == 1:
            figure.text(0.995, 0.008, panels[0][1], fontsize=8, color=FAINT, ha="right")
        figure.tight_layout(h_pad=2.5, w_pad=3, rect=(0, 0.02, 1, 1))
        figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="CSV file that bench_kernels.py wrote, or the word engine")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG file (default: beside the CSV; docs/bench.png)")
    options = parser.parse_args()
    if options.results == Path("engine"):
        picture = options.picture or DOCS / "bench.png"
        try:
            draw_engine(result_files.RESULTS, picture)
        except ValueError as error:
            parser.error(str(error))
        print(picture)
        return
    rows = newest(options.results) if options.results.is_file() else []
    if not rows:
        parser.error(f"{options.results} holds no measured rows: run bench/bench_kernels.py first")
    picture = options.picture or options.results.with_suffix(".png")
    draw(rows, picture)
    print(picture)


if __name__ == "__main__":
    main()
