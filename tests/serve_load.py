"""Many clients at a server that is killed in between: `python tests/serve_load.py --jobs 200 --kills 20 --clients 32`.

Clients ask `miga serve`, a process with the small golden model, for short videos. Some read what they asked for as it
grows, some a kilobyte at a time, some leave in the middle, some watch frames over a WebSocket. Meanwhile the server is
killed with SIGKILL at random moments and started again. Then half as many jobs again are made without a kill, and the
server's memory is measured over them. At the end no job that a client was answered for may be missing, and every video
must show the frames of `Engine.generate`. Prints a table; the exit code is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "integrations"))

import golden_model
import numpy as np
import served
from served import VIDEO, Client, process, written
from websockets.sync.client import connect

from miga_engine import Engine

served.SECONDS = 1800.0  # a queue is long
KINDS = [{"seed": seed, "num_frames": num_frames} for seed in (0, 1, 2) for num_frames in (7, 13, 30)]
MANNERS = ("reads", "reads slowly", "leaves", "watches", "forgets")
GONE = (OSError, EOFError, Exception)
"""What a client meets where the server is killed: it asks again."""


class Load:
    """The clients of a server, and what they have been answered."""

    def __init__(self, model: Path, folder: Path, workers: int, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.arguments = ["--model", str(model), "--workers", str(workers), "--save-every", "6", "--max-queue", "1000"]
        self.client: Client | None = None
        self.jobs: dict[str, dict[str, Any]] = {}
        """Kind of each job, by its id, that a client was answered for."""
        self.manners: Counter[str] = Counter()
        self.num_lost_connections = 0
        self._lock, self._left = threading.Lock(), 0

    def run(self, num_jobs: int, num_clients: int) -> None:
        """Ask for so many jobs, and wait until all have ended."""
        self._left = num_jobs
        threads = [threading.Thread(target=self._ask, args=(random.Random(self.chance.random()),))
                   for _ in range(num_clients)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self, chance: random.Random) -> None:
        while True:
            with self._lock:
                if self._left == 0:
                    return
                self._left -= 1
            kind, manner = chance.choice(KINDS), chance.choice(MANNERS)
            name = self._insist(lambda client, kind=kind: client.start(**kind))
            with self._lock:
                self.jobs[name] = kind
                self.manners[manner] += 1
            if manner != "forgets":
                with contextlib.suppress(*GONE):
                    self._behave(manner, name)
                self._insist(lambda client, name=name: client.ended(name))

    def _insist(self, ask: Any) -> Any:
        """An answer, of whichever server is there next."""
        until = time.monotonic() + 600
        while True:
            client = self.client
            try:
                if client is not None:
                    return ask(client)
            except AssertionError:
                raise
            except GONE:
                with self._lock:
                    self.num_lost_connections += 1
            assert time.monotonic() < until, "no server answers"
            time.sleep(0.2)

    def _behave(self, manner: str, name: str) -> None:
        client = self.client
        assert client is not None
        if manner == "watches":
            with connect(f"{client.address.replace('http', 'ws')}/v1/videos/{name}/live?frames=1") as live:
                for _ in live:
                    pass
            return
        with contextlib.closing(client.connect()) as connection:
            connection.request("GET", f"/v1/videos/{name}/content")
            answer = connection.getresponse()
            if manner == "leaves":
                answer.read1(100)
            elif manner == "reads":
                answer.read()
            else:
                while answer.read1(1000):
                    time.sleep(0.05)

    def memory(self) -> float:
        """MiB that the server's process holds."""
        measures = self._insist(lambda client: client.get("/metrics")).body.decode()
        found = re.search(r"^process_resident_memory_bytes (\S+)$", measures, re.M)
        assert found
        return float(found[1]) / 2**20

    def kill(self, times: int, over: threading.Thread) -> int:
        """Serve, and kill the server so many times while clients ask; how often it was killed. It serves on after."""
        num_kills = 0
        while over.is_alive() and num_kills < times:
            with process(self.folder, *self.arguments) as (client, server):
                self.client = client
                until = time.monotonic() + self.chance.uniform(0.1, 4)
                while time.monotonic() < until and over.is_alive():
                    time.sleep(0.01)
                if not over.is_alive():
                    break
                self.client = None
                server.kill()
                num_kills += 1
        return num_kills


def wrong_videos(load: Load, model: Path, folder: Path) -> list[str]:
    """What is wrong with the jobs that clients were answered for."""
    assert load.client is not None
    engine, shown, wrong = Engine.from_pretrained(model), {}, []
    options = {**golden_model.OPTIONS, "fps": VIDEO["fps"], "miga": golden_model.MIGA}
    for number, kind in enumerate(KINDS):
        video = engine.generate(VIDEO["prompt"], **kind, **options)
        shown[str(kind)] = written(video.frames, folder / f"{number}.mp4")
    for name, kind in load.jobs.items():
        answer = load.client.get(f"/v1/videos/{name}")
        if answer.status != 200:
            wrong.append(f"{name} is lost")
        elif answer.json["status"] != "completed":
            wrong.append(f"{name} is {answer.json['status']}: {answer.json['error']}")
        elif not np.array_equal(load.client.frames(name, folder), shown[str(kind)]):
            wrong.append(f"{name} shows other frames")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = golden_model.build(Path(scratch) / "model")
        load = Load(model, Path(scratch) / "jobs", asked.workers, asked.seed)
        started = time.monotonic()
        asking = threading.Thread(target=load.run, args=(asked.jobs, asked.clients))
        asking.start()
        num_kills = load.kill(asked.kills, asking)
        with process(load.folder, *load.arguments) as (client, _):
            load.client = client
            asking.join()
            with_kills, num_jobs = time.monotonic() - started, len(load.jobs)
            load.run(max(1, asked.jobs // 4), asked.clients)  # what is allocated once is allocated
            before, started = load.memory(), time.monotonic()
            load.run(max(1, asked.jobs // 2), asked.clients)
            after, without = load.memory(), time.monotonic() - started
            for name in load.jobs:
                client.ended(name)
            wrong = wrong_videos(load, model, Path(scratch))
    num_measured = max(1, asked.jobs // 2)
    rows = {
        "clients at once": asked.clients,
        "jobs, while the server was killed": num_jobs,
        "kills": num_kills,
        "connections lost": load.num_lost_connections,
        "seconds of that": f"{with_kills:.0f}",
        "jobs after that": len(load.jobs) - num_jobs,
        "seconds a job": f"{without / num_measured:.2f}",
        "clients that " + ", ".join(load.manners): ", ".join(map(str, load.manners.values())),
        f"memory before and after the last {num_measured} jobs": f"{before:.0f} and {after:.0f} MiB",
        "videos that are lost or show other frames": len(wrong),
    }
    for name, value in rows.items():
        print(f"{name:<60}{value}")
    print(*wrong[:20], sep="\n")
    return 1 if wrong or num_kills < asked.kills or after > 1.1 * before else 0


if __name__ == "__main__":
    sys.exit(main())
