"""What is broken, what breaks it and what loads it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

from fuzz_models import break_gguf, break_index, break_merges, break_pickle, break_safetensors
from fuzz_runs import break_request, break_session, break_values, break_video, break_yaml
from fuzz_values import CACHE, Folder, Random, break_bytes, break_json


def load_options(folder: Folder) -> None:
    """A --config file all the way to a request and the first steps of its run."""
    from miga_engine.cli.config_file import read_config
    from miga_engine.cli.settings import prompt_timeline, video_options

    settings = read_config(str(folder / "run.yaml"))
    prompt = prompt_timeline(settings)
    settings.pop("model", None)
    start(tiny(), {"prompt": prompt, **video_options(settings)})


def start(engine: Any, options: dict[str, Any]) -> None:
    """Resolve, and go as far as the buffers of the run where they are small."""
    from miga_engine.prompts import PromptTimeline

    request = engine.resolve(**options)
    PromptTimeline(request.timeline, request.miga.prompt_blend_frames, engine.bundle.first_video_frame)
    json.dumps(request.metadata("x"))


def tiny() -> Any:
    from miga_engine.engine import Engine

    if "tiny" not in CACHE:
        CACHE["tiny"] = Engine.from_pretrained("tiny", "cpu")
    return CACHE["tiny"]


def golden() -> Any:
    from miga_engine.engine import Engine

    if "golden" not in CACHE:
        CACHE["golden"] = Engine.from_pretrained(CACHE["pristine"] / "wan", "cpu", "float32")
        CACHE["golden"].name = "tiny"  # whose sessions need not be told where the model lies
    return CACHE["golden"]


def load_transformer(folder: Folder) -> None:
    from miga_engine import models

    models.load_transformer(folder)


def load_gguf(folder: Folder) -> None:
    from miga_engine import models

    models.load_transformer(folder / "wan.gguf")


def load_scaled(folder: Folder) -> None:
    from miga_engine import models

    models.load_transformer(folder / "scaled.safetensors")


def load_merged(folder: Folder) -> None:
    from miga_engine import models

    models.load_transformer(folder / "wan.safetensors", loras=[(folder / "adapter_model.safetensors", 0.7)])


def load_spiece(folder: Folder) -> None:
    from miga_engine.models.loading import load_tokenizer

    load_tokenizer(folder / "spiece.model")(["", "A red  balloon over é 木 ❤ ﬁ 12 hills </s> <pad>"])


def load_comfy(folder: Folder) -> None:
    """A whole ComfyUI folder, whose files are told by their keys, with what stands in the VAE's place."""
    from miga_engine.models.family import Sources
    from miga_engine.models.inspecting import describe_file
    from miga_engine.models.loading import load_bundle

    for file in sorted(folder.rglob("*.safetensors")):
        describe_file(file)
    load_bundle(Sources(folder, decoder="tae")).encode_prompts(["a red balloon"])


def load_vae(folder: Folder) -> None:
    from miga_engine import models

    models.load_vae(folder)


def load_text_encoder(folder: Folder) -> None:
    from miga_engine import models

    models.load_text_encoder(folder)


def load_and_encode(folder: Folder) -> None:
    """A whole folder, and a prompt through tokenizer and text encoder."""
    from miga_engine.models.loading import load_bundle

    bundle = load_bundle(folder)
    bundle.num_video_frames(bundle.window_frames)
    bundle.encode_prompts(["a red balloon, at 3 o'clock", bundle.default_negative_prompt])


def load_tokenizer(folder: Folder) -> None:
    from miga_engine.models.loading import load_tokenizer

    load_tokenizer(folder)(["", "A red balloon over é 木 ❤ 12 hills </s> <pad>"])


def load_clip_tokenizer(folder: Folder) -> None:
    from miga_engine.models.videocrafter2.tokenizer import CLIPTokenizer

    CLIPTokenizer.from_file(folder)(["", "A red balloon over é 木 hills <end_of_text>"])


def convert(folder: Folder) -> None:
    from miga_engine.models.convert import convert

    convert(folder / "model.ckpt", folder / "out.safetensors")


def load_session(folder: Folder) -> None:
    from miga_engine.runtime.session import is_session

    is_session(folder / "run.safetensors")
    golden().resume(folder / "run.safetensors").close()


MOST_CHUNKS = 20  # of a stream that is resumed; one that is longer is left


def resume_session(folder: Folder) -> None:
    """By the command, to the end, as if a stranger's file had been asked about and gone on with; then by the API."""
    from miga_engine import cli
    from miga_engine.engine import Engine
    from miga_engine.runtime.stream import Stream

    before = {path: path.read_bytes() for path in sorted(CACHE["victims"].iterdir())}
    original, following = Engine.from_pretrained, Stream.__next__

    def next_or_stop(self: Stream) -> Any:
        self.fuzz_chunks = getattr(self, "fuzz_chunks", 0) + 1
        if self.fuzz_chunks > MOST_CHUNKS:
            raise StopIteration
        return following(self)

    engine = golden()
    Engine.from_pretrained, Stream.__next__ = lambda *_, **__: engine, next_or_stop
    WRITTEN.clear()
    file = folder / "run.safetensors"
    try:
        named = [] if any(folder.glob("a*")) else ["-o", str(folder / "a.mkv")]
        for arguments in (["info", str(file)], ["resume", str(file), "-q", *named]):
            status = cli.main(arguments)
            if status not in (0, 2):
                raise AssertionError(f"{arguments[0]} ended with {status}")
        for path, content in before.items():
            if path.read_bytes() != content:
                raise AssertionError(f"{path} was written to")
        if len(list(CACHE["victims"].iterdir())) != len(before):
            raise AssertionError("something was written beside the victims")
        for name in WRITTEN:
            if not os.path.realpath(name).startswith((os.path.realpath(folder), "/dev/", "/proc/")):
                raise AssertionError(f"{name} was opened for writing")
        if not file.exists():  # it was complete, and the session went with it
            return
        with golden().resume(file) as stream:
            for _ in zip(range(MOST_CHUNKS), stream, strict=False):
                pass
    finally:
        Engine.from_pretrained, Stream.__next__ = original, following


WRITTEN: list[str] = []


def watch_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what is opened for writing."""
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    if event == "open" and isinstance(arguments[0], str) and arguments[2] is not None and arguments[2] & flags:
        WRITTEN.append(arguments[0])


def read_video(folder: Folder) -> None:
    from miga_engine.video.reading import read_metadata, read_video

    for path in sorted(folder.glob("a.m*")):
        try:
            read_metadata(path)
        finally:
            read_video(path)


def load_request(folder: Folder) -> None:
    start(tiny(), pickle.loads((folder / "request").read_bytes()))


SESSIONS = {"seed clip": 4, "warm-up": 12, "early": 18, "middle": 26, "done": 10**6}
"""Ticks after which the sessions were saved whose values are broken."""


@dataclasses.dataclass(frozen=True)
class Target:
    layout: str  # folder of the pristine files
    file: str  # the one that is broken
    breaker: Callable[[bytes, Random], bytes]
    load: Callable[[Folder], None]
    weight: int = 1
    is_written: bool = False  # the loader writes into the folder: its files are copies, and no links


DIT, VAE = "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.safetensors"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
TARGETS = {
    "safetensors": Target("wan", DIT, break_safetensors, load_transformer, 6),
    "safetensors (tiny)": Target("tiny", DIT, break_safetensors, load_transformer),
    "safetensors, shard": Target("shards", SHARD, break_safetensors, load_transformer, 2),
    "safetensors, VAE": Target("wan", VAE, break_safetensors, load_vae, 3),
    "safetensors, VAE (tiny)": Target("tiny", VAE, break_safetensors, load_vae),
    "safetensors, text encoder (tiny)": Target(
        "tiny", "models_t5_umt5-xxl-enc-bf16.safetensors", break_safetensors, load_text_encoder, 3
    ),
    "safetensors, VideoCrafter2": Target("vc2", "model.safetensors", break_safetensors, load_and_encode, 2),
    "safetensors, scaled fp8": Target("scaled", "scaled.safetensors", break_safetensors, load_scaled, 3),
    "LoRA": Target("lora", "adapter_model.safetensors", break_safetensors, load_merged, 4),
    "LoRA, adapter_config.json": Target("lora", "adapter_config.json", break_json, load_merged),
    "spiece.model": Target("spiece", "spiece.model", break_bytes, load_spiece, 3),
    "ComfyUI, text encoder": Target(
        "comfy", "models/text_encoders/umt5_xxl_fp16.safetensors", break_safetensors, load_comfy, 2
    ),
    "ComfyUI, tiny decoder": Target("comfy", "models/vae_approx/taew2_1.safetensors", break_safetensors, load_comfy, 2),
    "GGUF": Target("gguf", "wan.gguf", break_gguf, load_gguf, 6),
    "index": Target("shards", DIT + ".index.json", break_index, load_transformer, 3),
    "config.json": Target("wan", "config.json", break_json, load_transformer, 4),
    "config.json (tiny)": Target("tiny", "config.json", break_json, load_transformer),
    "config.json, VAE": Target("diffusers", "vae/config.json", break_json, load_vae, 2),
    "miga.json": Target("wan", "miga.json", break_json, load_and_encode),
    "tokenizer.json": Target("tiny", "google/umt5-xxl/tokenizer.json", break_json, load_tokenizer, 6),
    "tokenizer.json and text encoder": Target("wan", "google/umt5-xxl/tokenizer.json", break_json, load_and_encode),
    "tokenizer of CLIP": Target("clip", "merges.txt", break_merges, load_clip_tokenizer, 2),
    "tokenizer of CLIP, gz": Target("clip_gz", "bpe_simple_vocab_16e6.txt.gz", break_merges, load_clip_tokenizer, 2),
    "tokenizer of CLIP, JSON": Target("clip_json", "tokenizer.json", break_json, load_clip_tokenizer),
    "pickle, VAE": Target("pth", "Wan2.1_VAE.pth", break_pickle, load_vae, 6),
    "pickle, text encoder": Target("wan", "models_t5_umt5-xxl-enc-bf16.pth", break_pickle, load_text_encoder, 2),
    "pickle, convert": Target("ckpt", "model.ckpt", break_pickle, convert, 2),
    "YAML": Target("options", "run.yaml", break_yaml, load_options, 6),
    "request": Target("options", "request", break_request, load_request, 6),
    "session file": Target("session", "run.safetensors", break_session, load_session, 4),
    **{
        f"session values, {name}": Target(f"session_{name}", "run.safetensors", break_values, resume_session, 2, True)
        for name in SESSIONS
    },
    "video, mp4": Target("mp4", "a.mp4", break_video, read_video, 3),
    "video, mkv": Target("mkv", "a.mkv", break_video, read_video, 2),
}
