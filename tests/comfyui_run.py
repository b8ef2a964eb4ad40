"""The pack in a real ComfyUI: `python tests/comfyui_run.py --comfyui FOLDER --python PYTHON`.

Starts the server of a ComfyUI folder on the CPU, with the pack linked into a folder of custom nodes of its own, and
works through its HTTP interface: every example workflow; an interruption, in seconds; going on after it; unloading, in
MiB of the process; what is asked for wrongly. Frames must be those of `miga generate`, by their hashes. Prints what it
measured; the exit code is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_workflows
import golden_model
import numpy as np
import random_wan
from comfyui_workflows import PROMPT, Graph
from PIL import Image
from places import ROOT
from safetensors.torch import save_file

from miga_engine.models.wan.dit import WanDiT
from miga_engine.video.reading import read_video

PACK = ROOT / "miga_engine" / "integrations" / "comfyui"
OF_V1 = """from miga_engine.integrations.comfyui import schema

NODE_CLASS_MAPPINGS = schema.v1_classes()
"""
METHOD = {
    name: ("on" if value else "off") if isinstance(value, bool) else value
    for name, value in dataclasses.asdict(golden_model.MIGA).items()
}
MOST_SECONDS = 3.0
"""From an interruption to the end of the prompt."""


class Server:
    """A ComfyUI process and its HTTP interface."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path, output: Path) -> None:
        self.url, self.process, self.log, self.output = url, process, log, output

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON, that of a refusal too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def begin(self, graph: Graph) -> str:
        """Ask for a graph; the id of its prompt."""
        answer = self.ask("/prompt", {"prompt": graph})
        if "prompt_id" not in answer:
            raise AssertionError(f"the prompt was refused: {answer}")
        return str(answer["prompt_id"])

    def end(self, prompt_id: str, seconds: float = 400.0) -> dict[str, Any]:
        """Wait for a prompt's end; what its history says."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.ask(f"/history/{prompt_id}"):
                return dict(found[prompt_id])
            time.sleep(0.05)
        raise AssertionError(f"prompt {prompt_id} took more than {seconds} s")

    def run(self, graph: Graph) -> dict[str, Any]:
        """Run a graph that succeeds; its outputs by node."""
        ended = self.end(self.begin(graph))
        if ended["status"]["status_str"] != "success":
            raise AssertionError(f"the prompt failed: {ended['status']}")
        return dict(ended["outputs"])

    def error(self, graph: Graph) -> str:
        """Run a graph that fails; what its node says."""
        ended = self.end(self.begin(graph))
        return next(
            said["exception_message"] for kind, said in ended["status"]["messages"] if kind == "execution_error"
        )

    def path(self, outputs: dict[str, Any], node: str) -> Path:
        """The file that a node shows."""
        shown = outputs[node]["images"][0]
        return self.output / shown["subfolder"] / shown["filename"]

    def mebibytes(self) -> float:
        """Resident memory of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@contextlib.contextmanager
def served(comfyui: Path, python: str, port: int, base: Path, *, is_v1: bool) -> Iterator[Server]:
    """A server with the pack, whose files lie in a folder of its own."""
    for name in ("output", "input", "temp", "user", "custom_nodes", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    if is_v1:
        (base / "custom_nodes" / "miga.py").write_text(OF_V1)
    else:
        (base / "custom_nodes" / "miga").symlink_to(PACK)
    command = [python, "main.py", "--cpu", "--disable-api-nodes", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    paths = [str(ROOT), *filter(None, [os.environ.get("COMFYUI_PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    log = base / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=comfyui, env=environment, stdout=file, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", process, log, base / "output")
        try:
            until = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    server.ask("/queue")
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise AssertionError(f"ComfyUI did not start:\n{log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def digest(frames: Any) -> str:
    """Of frames uint8 `[T,H,W,3]`."""
    return f"{len(frames)} frames {hashlib.sha256(frames.tobytes()).hexdigest()[:16]}"


def by_command(folder: Path, name: str, *arguments: str) -> str:
    """The digest of the frames that the command line makes."""
    path = folder / f"{name}.mkv"
    command = [sys.executable, "-m", "miga_engine", "generate", PROMPT, "--output", str(path), "--seed", "3", "--quiet"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return digest(read_video(path))


class Report:
    """Lines of what was found, and whether any was wrong."""

    def __init__(self) -> None:
        self.is_wrong = False

    def __call__(self, what: str, found: object, is_right: bool) -> None:
        self.is_wrong |= not is_right
        print(f"{'ok   ' if is_right else 'WRONG'} {what}: {found}", flush=True)


def check_examples(server: Server, folder: Path, report: Report) -> None:
    """Each example that ends by itself, and the frames of the two ways out."""
    outputs = server.run(comfyui_workflows.read("generate"))
    path = server.path(outputs, "4")
    report("generate → SaveVideo", f"{path.name}, {len(read_video(path))} frames", len(read_video(path)) == 65)
    outputs = server.run(comfyui_workflows.read("render"))
    dusk = ("--prompt-at", "80", "a red kite over green hills at dusk", "--prompt-blend-frames", "32")
    ours, theirs = (
        digest(read_video(server.path(outputs, "4"))),
        by_command(folder, "render", "--num-frames", "161", *dusk),
    )
    report("render and `miga generate`", f"{ours} and {theirs}", ours == theirs)
    table = outputs["5"]["text"][0]
    report("eval", table.splitlines()[0], "consistency" in table)
    graph = comfyui_workflows.read("generate")
    graph["3"] = {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "frame"}}
    del graph["4"]
    outputs = server.run(graph)
    named = [server.output / shown["subfolder"] / shown["filename"] for shown in outputs["3"]["images"]]
    ours = digest(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in named]))
    theirs = by_command(folder, "generate", "--num-frames", "65")
    report("generate → SaveImage and `miga generate`", f"{ours} and {theirs}", ours == theirs)


def check_interruption(server: Server, folder: Path, report: Report) -> None:
    """An endless video is interrupted at moments before and behind its first frame, and gone on with."""
    num_frames = 321  # more than are made before the last interruption, and what is in the queue then
    theirs = by_command(folder, "resume", "--num-frames", str(num_frames))
    for number, seconds in enumerate((1.0, 3.0, 12.0), 1):
        prompt_id = server.begin(comfyui_workflows.read("endless"))
        time.sleep(seconds)
        asked = time.monotonic()
        server.ask("/interrupt", {})
        ended = server.end(prompt_id)
        took = time.monotonic() - asked
        kinds = [kind for kind, _ in ended["status"]["messages"]]
        report(f"interrupted after {seconds:g} s", f"{took:.2f} s", took <= MOST_SECONDS)
        report("ended as interrupted", kinds[-1], kinds[-1] == "execution_interrupted")
        session = f"video/miga_endless_{number:05}_.session.safetensors"
        report("session kept", session, (server.output / session).is_file())
        if number == 1:
            continue  # nothing is in its file: it was interrupted before the first frame
        graph = comfyui_workflows.read("resume")
        graph["2"]["inputs"] |= {"session": session, "num_frames": num_frames}
        ours = digest(read_video(server.path(server.run(graph), "2")))
        report("resumed and `miga generate`", f"{ours} and {theirs}", ours == theirs)


def large_model(folder: Path) -> Path:
    """A Wan2.1 network of a few hundred MiB, of random weights."""
    model = random_wan.official(folder)
    sizes = dataclasses.replace(random_wan.CONFIG, dim=512, ffn_dim=2048, num_heads=4, num_layers=12)
    save_file(WanDiT(sizes).state_dict(), model / random_wan.TRANSFORMER)
    said = {**dataclasses.asdict(sizes), "_class_name": "WanModel", "model_type": "t2v"}
    del said["inject_sample_info"]
    (model / "config.json").write_text(json.dumps(said))
    (model / "miga.json").write_text(json.dumps({"window_frames": 5, "default_negative_prompt": "blurry"}))
    return model


def check_memory(server: Server, folder: Path, report: Report) -> None:
    """A model's memory is given back on /free, and the next prompt reads its files again and makes the same frames."""
    model = large_model(folder / "large")
    size = sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 2**20
    graph = comfyui_workflows.read("render")
    graph["1"]["inputs"]["model"] = str(model)
    graph["3"]["inputs"] |= {name: value for name, value in METHOD.items() if value is not None}
    graph["4"]["inputs"] |= {**golden_model.OPTIONS, "num_frames": 5, "filename_prefix": "video/large"}
    del graph["5"], graph["4"]["inputs"]["prompts"]
    start, found, digests = server.mebibytes(), [], []
    for free in ({"unload_models": True}, {"unload_models": True, "free_memory": True}):
        graph["4"]["inputs"]["save_every"] += 1  # not the video that ComfyUI has already
        digests.append(digest(read_video(server.path(server.run(graph), "4"))))
        loaded = server.mebibytes()
        server.ask("/free", free)
        time.sleep(3)
        unloaded = server.mebibytes()
        found.append(f"{loaded:.0f} → {unloaded:.0f}")
        given_back = (loaded - unloaded) / size
        report(f"given back on {free}", f"{given_back:.0%} of {size:.0f} MiB", given_back > 0.9)
    report("memory before, with the model → without, MiB", f"{start:.0f}, {', '.join(found)}", True)
    report("frames after it", " and ".join(digests), len(set(digests)) == 1)


def check_refusals(server: Server, folder: Path, report: Report) -> None:
    """What cannot be made is an error of its node, in the engine's words."""
    graph = comfyui_workflows.read("generate")
    graph["2"]["inputs"]["num_frames"] = 10**9
    said = server.error(graph)
    report("too long for memory", said.strip(), "are free" in said)
    graph = comfyui_workflows.read("generate")
    graph["2"]["inputs"]["width"] = 97
    said = server.error(graph)
    report("a width that is none", said.strip(), "width" in said)
    graph["1"]["inputs"]["model"] = "nowhere"
    said = server.error(graph)
    report("a model that is not there", said.strip(), "nowhere" in said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", required=True, type=Path, help="ComfyUI's folder, that of main.py")
    parser.add_argument("--python", required=True, help="an interpreter with ComfyUI's packages and the engine's; "
                        "COMFYUI_PYTHONPATH is put before its own path")  # fmt: skip
    parser.add_argument("--only", choices=("examples", "interruption", "memory", "refusals"), help="one part")
    parser.add_argument("--v1", action="store_true", help="nodes as a ComfyUI without the V3 schema takes them")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--keep", type=Path, help="a folder for the server's files, which stays")
    options = parser.parse_args()
    report = Report()
    base = options.keep or Path(tempfile.mkdtemp(prefix="comfyui-"))
    try:
        with served(options.comfyui, options.python, options.port, base, is_v1=options.v1) as server:
            known = [name for name in server.ask("/object_info") if name.startswith("Miga")]
            report("nodes", ", ".join(known), len(known) == len(comfyui_workflows.NODES))
            for name in ("examples", "interruption", "memory", "refusals"):
                if options.only in (None, name):
                    globals()[f"check_{name}"](server, base, report)
    finally:
        if options.keep is None:
            shutil.rmtree(base)
    return int(report.is_wrong)


if __name__ == "__main__":
    sys.exit(main())
