"""A batch on a Ray cluster of two nodes whose workers are killed: `python tests/batch_cluster.py --jobs 40 --kills 10`.

Two nodes are begun on this machine, with a CPU each. While `miga batch` makes the jobs, workers are killed with SIGKILL
at random moments, and one node is taken away. Then every job's frames must be those of the engine alone, each video be
Two nodes are begun on this machine, with a CPU each. While `miga batch` makes the jobs, workers are killed by SIGKILL
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from places import ROOT
from torch import Tensor

from miga_engine import Engine
from miga_engine.integrations.batch.jobs import read_jobs

PROMPTS = ("a red kite over green hills at noon", "a yellow balloon over snowy hills at dawn",
           "a white plane over a desert at dusk", "a blue kite over an ocean at night")  # fmt: skip


def jobs_of(count: int, num_frames: int) -> list[dict[str, Any]]:
    """So many jobs of the embedded model, in few steps."""
    options = {"num_frames": num_frames, "num_inference_steps": 8, "stage2_steps": 2, "judge_step": 4, "height": 32,
               "width": 48}  # fmt: skip
    return [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, **options} for i in range(count)]


def hash_of(frames: Tensor) -> str:
    """The hash of frames uint8 `[n,H,W,3]`, as docs/batch.md has it."""
    known = b""
    for frame in frames.numpy():
        known = hashlib.blake2b(known + frame.tobytes(), digest_size=16).digest()
    return known.hex()


def workers() -> list[int]:
    """Processes of actors that are at a job, or load."""
    told = subprocess.run(["pgrep", "-f", "ray::BatchWorker"], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in told.split()]


def run(num_jobs: int, num_kills: int, num_frames: int, seed: int, seconds: float = 6.0) -> list[str]:
    """Everything that went wrong, in sentences."""
    from ray.cluster_utils import Cluster

    chance, jobs = random.Random(seed), jobs_of(num_jobs, num_frames)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        second = cluster.add_node(num_cpus=1)
        try:
            command = [sys.executable, "-m", "miga_engine", "batch", folder / "jobs.jsonl", "--output", folder / "out"]
            command += ["--ray", cluster.address, "--workers", "2", "--save-every", "6", "--retries", "20", "--quiet"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            batch = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
            killed, is_removed, next_kill = 0, False, time.monotonic() + seconds
            while batch.poll() is None:
                time.sleep(0.1)
                made = folder / "out" / "manifest.jsonl"
                num_made = len(made.read_text().splitlines()) if made.exists() else 0
                if not num_made or time.monotonic() < next_kill:
                    continue
                if killed < num_kills and (there := workers()):
                    os.kill(chance.choice(there), signal.SIGKILL)
                    killed += 1
                elif killed >= num_kills // 2 and not is_removed and num_made >= num_jobs // 2:
                    cluster.remove_node(second, allow_graceful=False)
                    is_removed = True
                next_kill = time.monotonic() + chance.uniform(0.2, seconds)
            said = batch.stderr.read() if batch.stderr is not None else ""
        finally:
            cluster.shutdown()
        print(said.strip(), f"; {killed} kills, a node removed: {is_removed}", flush=True)
        wrong = [] if batch.returncode == 0 else [f"the command ended with {batch.returncode}"]
        wrong += [] if killed >= num_kills and is_removed else [f"{killed} kills, a node removed: {is_removed}"]
        return wrong + _faults(folder / "out", folder / "jobs.jsonl")


def _faults(out: Path, path: Path) -> list[str]:
    engine, jobs = Engine.from_pretrained("tiny", "cpu"), read_jobs(path, {}, [])
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    wrong = []
    if [record["name"] for record in records] != [job.name for job in jobs]:
        wrong.append("the manifest does not have every job once, in order")
    for job, record in zip(jobs, records, strict=False):
        if record["made"]["frames"] != hash_of(engine.generate(job.prompt, **job.options).frames):
            wrong.append(f"{record['name']} has other frames than it has alone")
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    if there != {record["made"]["video"] for record in records} | {"manifest.jsonl"}:
        wrong.append(f"other files lie there: {sorted(there)}")
    hosts = sum(record["made"]["attempts"] > 1 for record in records)
    print(f"{len(records)} videos, {hosts} of them made in parts", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--num-frames", type=int, default=61)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    wrong = run(given.jobs, given.kills, given.num_frames, given.seed)
    for sentence in wrong:
        print(sentence)
    print("failed" if wrong else "passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
