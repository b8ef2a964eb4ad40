"""The newest results as a table in README.md, between `<!-- bench -->` and `<!-- /bench -->`, and those of the formats
of weights in docs/weights.md, between `<!-- reading -->` and `<!-- /reading -->`: `python bench/table.py`.

Every line is a ratio within one run, with the device it was measured on; what has no rows yet is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import result_files

README = Path(__file__).parent.parent / "README.md"
WEIGHTS = README.parent / "docs" / "weights.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
READING = ("<!-- reading -->", "<!-- /reading -->")
READING_HEAD = ("format", "GB/s of the file", "of a plain read", "memory", "on")
HEAD = ("what", "dtype", "measured", "compared with", "times as good", "on")


def lines(results: Path) -> Iterator[tuple[str, ...]]:
    """Rows of the table, from the CSV files of both kinds of device."""
    for device in ("cuda", "cpu"):
        yield from _engine(results / f"engine_{device}.csv")
        yield from _forward(results / f"forward_{device}.csv")
        yield from _load(results / f"load_{device}.csv")
        yield from _memory(results / f"memory_{device}.csv", "allocated_mib" if device == "cuda" else "peak_mib")


def _engine(path: Path) -> Iterator[tuple[str, ...]]:
    rows = result_files.newest(path, "what", "model", "dtype", "implementation")
    for row in rows:
        if row["what"] == "generate" and row["implementation"] == "engine":
            rival = next((r for r in rows if _is_rival(r, row)), None) if row["x_baseline"] else None
            yield (
                f"whole video, `{row['model']}`, {row['request']}",
                row["dtype"],
                f"{float(row['video_frames_per_s']):.3g} frames/s",
                f"a plain diffusers loop, {float(rival['video_frames_per_s']):.3g} frames/s" if rival else "",
                _times(row["x_baseline"]),
                _device(row),
            )
            if rival and row["run_mib"] and rival["run_mib"]:
                yield (
                    "its memory above the loaded model",
                    row["dtype"],
                    f"{float(row['run_mib']):.3g} MiB",
                    f"the same loop, {float(rival['run_mib']):.3g} MiB",
                    _times(float(rival["run_mib"]) / float(row["run_mib"])),
                    _device(row),
                )
            share = f"{100 * float(row['rest']):.2g} % of the time"
            yield "its bookkeeping", row["dtype"], share, "", "", _device(row)
        elif row["what"] == "iteration":
            ratio = f"{1 / float(row['network']):.4f} of its forwards"
            syncs = f"; {row['host_syncs']} host waits" if row["host_syncs"] else ""
            name = f"iteration, {row['model']}, {row['request']}"
            yield name, row["dtype"], ratio + syncs, "", "", _device(row)
    imports = {row["implementation"]: row for row in rows if row["what"] == "import"}
    if len(imports) == 2:
        over = float(imports["miga_engine"]["seconds"]) - float(imports["torch"]["seconds"])
        row = imports["torch"]
        yield "import", "", f"{over:+.2f} s", f"`import torch`, {float(row['seconds']):.2g} s", "", _device(row)


def _is_rival(row: dict[str, str], ours: dict[str, str]) -> bool:
    keys = ("what", "model", "dtype", "request")
    return row["implementation"] == "diffusers" and all(row[key] == ours[key] for key in keys)


def _forward(path: Path) -> Iterator[tuple[str, ...]]:
    names = {"op": "SDPA in both", "op auto": "attention by `auto`"}
    for row in result_files.newest(path, "op", "dtype", "implementation"):
        if row["implementation"] not in names:
            continue
        name = f"{row['op']}, {row['shape']}, {names[row['implementation']]}"
        measured = f"{100 * float(row['of_ceiling']):.0f} % of the matmul rate"
        rivals = [("x_eager", "diffusers, eager"), ("x_compiled", "diffusers, `torch.compile`")]
        present = [(row[key], rival) for key, rival in rivals if row[key]]
        times = " · ".join(_times(value) for value, _ in present)
        yield name, row["dtype"], measured, " · ".join(rival for _, rival in present), times, _device(row)


def _load(path: Path) -> Iterator[tuple[str, ...]]:
    for row in result_files.newest(path, "op", "dtype", "implementation"):
        if row["implementation"] == "op":
            measured = f"{float(row['rate']):.3g} GB/s, {float(row['of_ceiling']):.2f} of a plain read"
            name = f"`load_transformer`, {row['shape']} float32"
            yield name, row["dtype"], measured, "`load_file`", _times(row["x_eager"]), _device(row)


def _memory(path: Path, column: str) -> Iterator[tuple[str, ...]]:
    rows = [
        row
        for row in result_files.newest(path, "model", "latent_frames", "allocator")
        if int(row["latent_frames"]) > 1000
    ]
    longest = max((int(row["latent_frames"]) for row in rows), default=0)
    for row in rows:
        if int(row["latent_frames"]) == longest:
            settings = f", `{row['allocator']}`" if row["allocator"] else ""
            name = f"peak memory over {longest:,} latent frames{settings}"
            growth = f"{100 * (float(row['x_1000']) - 1):+.1f} %"
            yield name, "", growth, f"at 1,000, {float(row[column]) / float(row['x_1000']):.0f} MiB", "", _device(row)


def _times(ratio: str | float) -> str:
    return f"{float(ratio):.3g}×" if ratio else ""


def _device(row: dict[str, str]) -> str:
    threads = f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}" if row["threads"] else ""
    return f"{row['device']}{threads}"


def table(results: Path) -> str:
    """Markdown. Raises ValueError where nothing has been measured."""
    rows = list(lines(results))
    if not rows:
        raise ValueError(f"{results} holds no results of the engine: run `make bench` first")
    cells = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def reading_table(path: Path) -> str:
    """Markdown, of how fast each format of weights is read."""
    rows = [row for row in result_files.newest(path, "shape", "implementation") if row["implementation"] == "op"]
    cells = [READING_HEAD, ("---",) * len(READING_HEAD)]
    cells += [
        (row["shape"], f"{float(row['rate']):.2g}", f"{float(row['of_ceiling']):.2f}", row["note"], _device(row))
        for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def insert(text: str, block: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with `block` in place of what stood between the markers. Raises ValueError where they are missing."""
    start, stop = markers
    before, begin, rest = text.partition(start)
    old, end, after = rest.partition(stop)
    if not begin or not end or start in old:
        raise ValueError(f"the page holds no {start} followed by {stop}: put both on lines of their own")
    return f"{before}{start}\n\n{block}\n\n{stop}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--print", action="store_true", help="print the table and leave the README alone")
    options = parser.parse_args()
    try:
        block = table(result_files.RESULTS)
        if options.print:
            print(block)
        else:
            options.readme.write_text(insert(options.readme.read_text(encoding="utf-8"), block), encoding="utf-8")
            text, rows = WEIGHTS.read_text(encoding="utf-8"), reading_table(result_files.RESULTS / "formats_cpu.csv")
            WEIGHTS.write_text(insert(text, rows, READING), encoding="utf-8")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
