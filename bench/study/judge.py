"""`python -m bench.study.judge`: does the judge of self-reflection see an anomaly? ROC of its variants at every step.

A run of the embedded model is stopped between two passes, latent frames of its queue are replaced by others noised to
the very level they stand at, and the pass goes on: what the judge then sees is a queue with a known anomaly. Its scores
in undisturbed passes are the negatives. Planting a run's own frames noised anew ("own") must go unnoticed: it says how
much of a detection is owed to planting itself. And whether a judge foresees what goes wrong by itself ("natural") is
measured on undisturbed passes: there the positives are the groups that fit worst to those before once they are clean.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.command import Parser, run_command
from bench.study.methods import NUM_PROMPTS, PROMPTS, SCENES, method_options
from bench.study.paired import pyplot, save_figure
from miga_engine import ops
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.files import write_whole
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import add_noise
from miga_engine.tiny import world
from miga_engine.tiny.classifier import to_tensor

KINDS = {
    "own": "the run's own frames, noised anew",
    "swap": "the judged group alone from another scene",
    "cut": "the judged group and what follows from another scene",
    "colour": "the judged group and what follows with red and blue exchanged",
    "jump": "the judged group and what follows from far earlier in the run",
}
ANOMALIES = tuple(KINDS)[1:]
VARIANTS = (("latent", "mean"), ("latent", "all"), ("x0", "mean"), ("x0", "all"))
PLANTED_GROUPS = 3
"""Groups a lasting anomaly covers: all that the windows which commit the judged group read."""
FIRST_POINT, POINT_STRIDE = 8, 4
"""Passes of Stage 1 before the first planting and between plantings; a jump goes back by the frames of the former."""
FALSE_ALARMS = 0.02
"""Share of undisturbed passes that a threshold lets through: each costs a search."""
NATURAL_SHARE = 0.1
"""Share of undisturbed groups that count as naturally inconsistent: those with the largest final drop."""


@dataclass(frozen=True)
class Judgement:
    """Score of one pass, and the score of the pass before, by one variant at one step; kind "" = undisturbed.

    final_drop is how far the group's score (all channels) lies below that of the group before once both are clean; None
    for planted passes, and where the run ended before.
    """

    prompt: int
    kind: str
    judge_step: int
    judge: str
    channels: str
    score: float
    previous: float
    final_drop: float | None = None

    @property
    def drop(self) -> float:
        """What self-reflection compares with score_drop."""
        return self.previous - self.score


def auc(negatives: npt.ArrayLike, positives: npt.ArrayLike) -> float:
    """Area under the ROC: the chance that a positive exceeds a negative, ties counted half; nan where there is none."""
    low, high = np.sort(np.asarray(negatives, np.float64)), np.asarray(positives, np.float64)
    if not len(low) or not len(high):
        return float("nan")
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def roc(negatives: npt.ArrayLike, positives: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Shares of negatives and positives at or above every threshold, from (0, 0) to (1, 1)."""
    low, high = np.sort(np.asarray(negatives, np.float64)), np.sort(np.asarray(positives, np.float64))
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([low, high]))[::-1]])
    return (
        1 - np.searchsorted(low, thresholds, "left") / len(low),
        1 - np.searchsorted(high, thresholds, "left") / len(high),
    )


# Runs ------------------------------------------------------------------------------------------------------------


class _Probe:
    """A run without self-reflection whose judges are asked from outside, between ticks of Stage 1."""

    def __init__(self, engine: Engine, prompt_index: int, *, num_points: int) -> None:
        config = method_options(engine, "zigzag+stage2+guidance+anchor")["miga"]
        num_levels = engine.preset.sampling.num_inference_steps - config.stage2_steps
        self.width, self.reference_groups = config.zigzag_width, config.reference_groups
        self.last_point = FIRST_POINT + (num_points - 1) * POINT_STRIDE
        num_latents = (self.last_point + num_levels) * self.width  # all that the queue holds at the last point
        num_frames = engine.bundle.num_video_frames(num_latents)
        request = engine.resolve(PROMPTS[prompt_index], num_frames=num_frames, seed=prompt_index, miga=config)
        self.run: VideoRun = engine.start(request)
        self.clean: list[Tensor] = []

    def tick(self) -> None:
        clean = self.run.tick()
        if clean is not None:
            self.clean.append(clean.latents)

    def frames(self, step: int) -> range:
        """Frame numbers of the group at this step between two ticks of Stage 1."""
        first = self.run.head + (self.run.handoff_step - 1 - step) * self.width
        return range(first, first + self.width)

    def scores(self, step: int) -> list[float]:
        """Of the group that stands at `step`, by each of `VARIANTS`."""
        store, judged = self.run.store, self.frames(step)
        reference = store.index(store.slots(range(judged.start - self.reference_groups * self.width, judged.start)))
        candidate = store.index(store.slots(judged))
        scores = []
        for judge, channels in VARIANTS:
            values = store.x0 if judge == "x0" else store.sample
            score = ops.consistency_score(values[reference], values[candidate][None], channels=channels)
            scores.append(float(score[0]))
        return scores

    def plant(self, latents: Tensor, step: int, generator: torch.Generator) -> None:
        """Noise clean latents `[k,C,H,W]` to the levels of the group at `step` and of the groups behind it."""
        store = self.run.store
        for group in latents.split(self.width):
            if step < 0:
                return
            noise = torch.randn(group.shape, generator=generator).to(group.device)
            numbers = self.frames(step)
            noised = add_noise(self.run.schedule, group, noise, step)
            store.put(store.slots(numbers), noised, step_index=step, numbers=numbers)
            step -= 1


def _final_score(latents: Tensor, first: int, width: int, reference_groups: int) -> float | None:
    """Score of the group that starts at `first` of the clean latents `[k,C,h,w]`; None where they lack it."""
    start = first - reference_groups * width
    if start < 0 or first + width > len(latents):
        return None
    judged = latents[first : first + width]
    return float(ops.consistency_score(latents[start:first], judged[None], channels="all")[0])


def _exchanged_colours(engine: Engine, latents: Tensor) -> Tensor:
    """The same video with red and blue exchanged, as latents `[k,C,h,w]`."""
    vae = engine.bundle.vae
    frames = vae.decode(latents.transpose(0, 1)[None])  # [1,3,T,H,W]
    return vae.encode(frames.clamp(-1, 1).flip(1))[0].transpose(0, 1).float()


def _true_latents(engine: Engine, scene: world.Scene, num_latents: int) -> Tensor:
    """Latents `[k,C,h,w]` of the scene as the world renders it, from inside a clip."""
    video = to_tensor(world.render(scene, 0, 4 * num_latents + 1)[0]).to(engine.device)
    return engine.bundle.vae.encode(video.transpose(0, 1)[None])[0, :, 1:].transpose(0, 1).float()


@torch.no_grad()
def judge_run(engine: Engine, prompt_index: int, steps: Sequence[int], *, num_points: int) -> list[Judgement]:
    """Judgements of one prompt's run: every undisturbed pass of Stage 1, and every kind of anomaly at some of them."""
    probe = _Probe(engine, prompt_index, num_points=num_points)
    run, width, judgements = probe.run, probe.width, list[Judgement]()

    def note(kind: str, step: int, scores: Sequence[float], previous: Sequence[float], final: float | None) -> None:
        scored = zip(VARIANTS, scores, previous, strict=True)
        judgements.extend(Judgement(prompt_index, kind, step, *names, now, then, final) for names, now, then in scored)

    while run.stage != "stage1":
        probe.tick()
    probe.tick()
    points, undisturbed, num_passes = list[Any](), list[Any](), 0
    previous = {step: probe.scores(step) for step in steps}
    while run.stage == "stage1":
        if num_passes in range(FIRST_POINT, probe.last_point + 1, POINT_STRIDE):
            points.append((copy.deepcopy(run.state()), previous))
        probe.tick()
        if run.stage == "stage1":
            before, previous = previous, {step: probe.scores(step) for step in steps}
            undisturbed += [(step, probe.frames(step).start, previous[step], before[step]) for step in steps]
        num_passes += 1
    while run.stage != "done":
        probe.tick()

    own = torch.cat(probe.clean)
    for step, first, scores, before in undisturbed:
        then, now = (_final_score(own, start, width, probe.reference_groups) for start in (first - width, first))
        note("", step, scores, before, None if then is None or now is None else then - now)

    colours = _exchanged_colours(engine, own)
    other = _true_latents(engine, SCENES[(prompt_index + 1) % len(SCENES)], PLANTED_GROUPS * width)
    lots = _apart(steps, run.window_frames // width + 2 + PLANTED_GROUPS)
    for number, ((tensors, numbers), previous) in enumerate(points):
        for kind in KINDS:
            for lot in lots:
                generator = torch.Generator().manual_seed(1000 * prompt_index + number)
                run.load_state(tensors, numbers)
                for step in lot:
                    first = probe.frames(step - 1).start
                    planted = {
                        "own": own[first:],
                        "swap": other[:width],
                        "cut": other,
                        "colour": colours[first:],
                        "jump": own[first - FIRST_POINT * width :],
                    }[kind][: PLANTED_GROUPS * width]
                    probe.plant(planted, step - 1, generator)
                probe.tick()
                for step in lot:
                    note(kind, step, probe.scores(step), previous[step], None)
    return judgements


def _apart(steps: Sequence[int], distance: int) -> list[list[int]]:
    """The steps in as few lots as keep the steps of a lot at least `distance` apart: anomalies planted together
    must not be seen by each other's windows."""
    lots: list[list[int]] = []
    for step in sorted(steps):
        lot = next((lot for lot in lots if step - lot[-1] >= distance), None)
        if lot is None:
            lots.append([step])
        else:
            lot.append(step)
    return lots


# Report ----------------------------------------------------------------------------------------------------------


def summarise(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """A row per variant, judge step and kind, one for all anomalies together, and one for what went wrong by itself.

    auc_drop, auc_score: of the drop from the pass before, and of the score itself; 0.5 = blind, 1 = never wrong.
    auc_planted: of the drop, against the run's own frames planted, which leaves out what planting itself changes.
    Of "natural", positives and negatives are undisturbed groups, and auc_planted is nan.
    score_drop: the drop that only `FALSE_ALARMS` of the negatives exceed; detected: share of the positives beyond it.
    """
    rows = []
    finals = [j.final_drop for j in judgements if j.final_drop is not None]
    worst = float(np.quantile(finals, 1 - NATURAL_SHARE)) if finals else np.inf
    for judge, channels in VARIANTS:
        for step in sorted({j.judge_step for j in judgements}):
            own = [j for j in judgements if (j.judge, j.channels, j.judge_step) == (judge, channels, step)]
            undisturbed = [j for j in own if not j.kind]
            known = [j for j in undisturbed if j.final_drop is not None]
            control = [j for j in own if j.kind == "own"]
            for kind in (*KINDS, "anomalies", "natural"):
                if kind == "natural":
                    found = [j for j in known if j.final_drop is not None and j.final_drop >= worst]
                    negatives, controls = [j for j in known if j not in found], list[Judgement]()
                else:
                    found = [j for j in own if j.kind in (ANOMALIES if kind == "anomalies" else (kind,))]
                    negatives, controls = undisturbed, control
                threshold = float(np.quantile([j.drop for j in negatives], 1 - FALSE_ALARMS)) if negatives else np.inf
                rows.append({
                    "judge": judge, "channels": channels, "judge_step": step, "kind": kind,
                    "num_negatives": len(negatives), "num_positives": len(found),
                    "auc_drop": auc([j.drop for j in negatives], [j.drop for j in found]),
                    "auc_score": auc([-j.score for j in negatives], [-j.score for j in found]),
                    "auc_planted": auc([j.drop for j in controls], [j.drop for j in found]),
                    "score_drop": threshold,
                    "detected": _mean([j.drop > threshold for j in found]),
                    "mean_score": _mean([j.score for j in negatives]),
                    "mean_drop": _mean([j.drop for j in found]),
                })  # fmt: skip
    return rows


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """AUC of the drop: a row per variant, a column per judge step."""
    steps = sorted({row["judge_step"] for row in rows})
    lines = [
        "| judge | what | " + " | ".join(f"step {step}" for step in steps) + " |",
        "| --- | --- " + "| ---: " * len(steps) + "|",
    ]
    for kind in ("anomalies", "natural"):
        for judge, channels in VARIANTS:
            cells = {
                row["judge_step"]: f"{row['auc_drop']:.3f} ({100 * row['detected']:.0f} % at {row['score_drop']:.3f})"
                for row in rows
                if (row["judge"], row["channels"], row["kind"]) == (judge, channels, kind)
            }
            lines.append(f"| {judge}/{channels} | {kind} | " + " | ".join(cells[step] for step in steps) + " |")
    return "\n".join(lines) + "\n"


def draw(judgements: Sequence[Judgement], rows: Sequence[dict[str, Any]], judge_step: int, picture: Path) -> None:
    """Left: ROC of the variants at `judge_step`. Middle: AUC over judge steps. Right: AUC of each kind there."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    for i, (judge, channels) in enumerate(VARIANTS):
        name, colour = f"{judge}/{channels}", plt.get_cmap("tab10")(i)
        own = [j for j in judgements if (j.judge, j.channels, j.judge_step) == (judge, channels, judge_step)]
        false, true = roc([j.drop for j in own if not j.kind], [j.drop for j in own if j.kind in ANOMALIES])
        left.step(false, true, where="post", color=colour, label=name + (" (paper)" if i == 0 else ""))
        mine = [row for row in rows if (row["judge"], row["channels"]) == (judge, channels)]
        for kind, line in (("anomalies", "o-"), ("natural", "x--")):
            overall = [row for row in mine if row["kind"] == kind]
            middle.plot([r["judge_step"] for r in overall], [r["auc_drop"] for r in overall], line, color=colour)
        bars = [row for row in mine if row["judge_step"] == judge_step and row["kind"] != "anomalies"]
        right.bar(np.arange(len(bars)) + 0.2 * i - 0.3, [r["auc_drop"] for r in bars], 0.19, color=colour)
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="undisturbed passes flagged", ylabel="anomalies found", title=f"ROC at judge step {judge_step}")
    left.legend(loc="lower right", frameon=False)
    middle.set(xlabel="judge step (0 = noise)", title="area under the ROC: planted (o), natural (x)")
    right.set(title=f"by kind, judge step {judge_step}", ylim=(0.3, 1.02))
    right.set_xticks(range(len(KINDS) + 1), (*KINDS, "natural"))
    for axis in (middle, right):
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    for axis in (left, middle):
        axis.grid(alpha=0.25)
    save_figure(figure, picture)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m bench.study.judge",
        description="Plant anomalies into queues of the embedded model and measure which judge sees them, at which "
        "step. What --folder already holds is not made again.",
    )
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the judgements are kept")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, metavar="N", help=f"at most {NUM_PROMPTS}")
    parser.add_argument(
        "--points", type=int, default=2, metavar="N", help="passes of each run that are planted (default: 2)"
    )
    parser.add_argument("--judge-steps", type=int, nargs="+", default=[2, 4, 6, 8, 10, 12, 14, 16], metavar="S")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per variant, step and kind (default: "
                        "DIR/judge.csv)")  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw ROC and AUC (needs matplotlib)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Judge every prompt's run, write the CSV file, print the table."""
    torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained("tiny")
    groups = engine.preset.miga.reference_groups
    last = engine.preset.sampling.num_inference_steps - engine.preset.miga.stage2_steps - 1 - groups
    for step in options.judge_steps:
        if not 1 <= step <= last:
            raise ConfigError(f"--judge-steps has {step}: give steps from 1 to {last}")
    if not 1 <= options.prompts <= NUM_PROMPTS:
        raise ConfigError(f"--prompts is {options.prompts}: give 1 to {NUM_PROMPTS}")
    options.folder.mkdir(parents=True, exist_ok=True)
    judgements: list[Judgement] = []
    for index in range(options.prompts):
        path = options.folder / f"{index:02d}_{options.points}.json"
        if not path.exists():
            found = judge_run(engine, index, options.judge_steps, num_points=options.points)
            write_whole(path, json.dumps([asdict(judgement) for judgement in found]))
            print(f"{path}: {len(found)} judgements", flush=True)
        judgements += [Judgement(**record) for record in json.loads(path.read_text())]
    judgements = [judgement for judgement in judgements if judgement.judge_step in options.judge_steps]
    rows = summarise(judgements)
    csv_path = options.csv or options.folder / "judge.csv"
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    with io.StringIO(newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write_whole(csv_path, stream.getvalue())
    print(markdown_table(rows))
    if options.picture:
        step = engine.preset.miga.judge_step
        draw(judgements, rows, step if step in options.judge_steps else options.judge_steps[0], options.picture)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
