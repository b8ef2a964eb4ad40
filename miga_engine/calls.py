"""What the methods of `Engine` are asked for, the records of `config` put together and what only Python can give, and
what they give."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass
from typing import Any

import torch

from miga_engine.config import NUM_FRAMES, LoadOptions, MigaConfig, StreamOptions, as_texts
from miga_engine.device import own_modes
from miga_engine.errors import ConfigError
from miga_engine.fields import Checked, option
from miga_engine.options import with_default
from miga_engine.request import Request
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.stream import Chunk, Event


def _given(default: Any, help: str, shown: str = "") -> Any:
    """A field for what only Python can give."""
    return option(default, help, shown=shown, kind=object, is_hosted=False, is_recorded=False)


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each chunk."""

    num_frames_out: int
    num_frames: int | None
    chunk: Chunk


@dataclass(frozen=True)
class Video:
    """A finished video: `frames` uint8 `[T,H,W,3]` on the CPU."""

    frames: torch.Tensor
    fps: int | str
    metadata: Mapping[str, Any]

    @own_modes()
    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write an mp4, mkv (lossless), PNG sequence or raw file, by suffix; OutputError where that cannot be."""
        from miga_engine.video.outputs import open_sink

        height, width = self.frames.shape[1:3]
        with open_sink(path, self.fps, width, height, metadata=dict(self.metadata), overwrite=overwrite) as sink:
            sink.write(self.frames)


@dataclass(frozen=True)
class LoadCall(LoadOptions):
    """What `from_pretrained` is asked for."""

    _: KW_ONLY
    ranks: Ranks | None = option(
        None, "the processes that share the windows of each pass; all must ask for the same video, and rank 0 gives "
        "its frames", kind=object, is_hosted=False, is_recorded=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ComponentsCall(Checked):
    """What `from_components` is asked for."""

    transformer: object = _given(MISSING, "a module or state dict, official, of Diffusers or of ComfyUI; of "
                              "VideoCrafter2 all of its state dict")  # fmt: skip
    vae: object = _given(None, "the same; or a decoder of one's own, a `models.protocols.VAE`")
    text_encoder: object = _given(None, "the same", "none: `embeddings` are all that prompts can name")
    tokenizer: object = _given(None, "of tokenizers or transformers, or a tokenizer.json or spiece.model")
    transformer_2: object = _given(None, "the network for low noise of Wan2.2 A14B")
    embeddings: object = _given(None, "text embeddings [T,D] by prompt; see `Engine.hold_embedding`")
    transformer_config: object = _given(None, "what its config.json says, beside what a module says itself")
    vae_config: object = _given(None, "what its config.json says, beside what a module says itself")
    name: str = option("components", "what messages, metadata and session files call the model", is_hosted=False)
    window_frames: int | None = option(None, "latent frames the network was trained to see together",
                                       shown="by model", least=1, is_hosted=False)  # fmt: skip
    default_negative_prompt: str | None = option(None, "negative prompt of those who give none", shown="by model",
                                                 is_hosted=False)  # fmt: skip
    device: str | torch.device | None = option(None, "where it computes: what lies elsewhere is copied there",
                            shown="that of the transformer", kind=object, is_hosted=False)  # fmt: skip
    dtype: str | None = with_default(LoadOptions, "dtype", None)
    vae_dtype: str | None = with_default(LoadOptions, "vae_dtype", None)
    decoder: str = with_default(LoadOptions, "decoder", "vae")
    preset: str | None = with_default(LoadOptions, "preset", None)
    attention: str = with_default(LoadOptions, "attention", "auto")
    compile: bool = with_default(LoadOptions, "compile", False)
    capture: bool = with_default(LoadOptions, "capture", True)

    def __post_init__(self) -> None:
        as_texts(self, LoadOptions)
        super().__post_init__()

    def prompts(self) -> Mapping[str, Any]:
        """The embeddings that are given, by prompt."""
        if self.embeddings is not None and not isinstance(self.embeddings, Mapping):
            raise ConfigError(f"embeddings is of type {type(self.embeddings).__name__}: give tensors [T,D] by prompt")
        return self.embeddings or {}

    def extra(self) -> dict[str, Any]:
        """What a miga.json would say."""
        said = {name: getattr(self, name) for name in ("window_frames", "default_negative_prompt")}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class StreamControls(StreamOptions):
    """How frames leave a run, and who hears of it and can end it."""

    on_event: Callable[[Event], None] | None = option(
        None, "is called with each event: scores, searches, chunks, warnings", kind=object, is_hosted=False
    )
    is_cancelled: Callable[[], bool] | None = option(
        None, "is asked between passes; True ends the video after what was already made", kind=object,
        is_hosted=False,
    )  # fmt: skip


@dataclass(frozen=True)
class StreamCall(Request, StreamControls):
    """What `stream` is asked for."""


@dataclass(frozen=True)
class GenerateCall(StreamCall):
    """What `generate` is asked for."""

    num_frames: int = with_default(Request, "num_frames", NUM_FRAMES)
    _: KW_ONLY
    callback: Callable[[Progress], bool | None] | None = option(
        None, "is called after each chunk; False ends the run", kind=object, is_hosted=False
    )


@dataclass(frozen=True)
class ResumeCall(StreamControls):
    """What `resume` is asked for."""

    path: str | os.PathLike[str] = option(MISSING, "the session file", kind=object, is_hosted=False)
    num_frames: int | None = with_default(Request, "num_frames", None)


@dataclass(frozen=True)
class ReplayCall(StreamControls):
    """What `replay` is asked for."""

    path: str | os.PathLike[str] = option(MISSING, "the session file", kind=object, is_hosted=False)
    image: object = with_default(Request, "image", None)
    video: object = with_default(Request, "video", None)


@dataclass(frozen=True)
class RunCall(StreamControls):
    """What `run` is asked for."""

    request: Request = option(MISSING, "as `resolve` gives it", kind=object, is_hosted=False)
    attention: dict[str, str] | None = option(
        None, "see `ops.attention_choices`; those of a run that is to be repeated, to which this one adds its own",
        kind=object, is_hosted=False,
    )  # fmt: skip


@dataclass(frozen=True)
class EstimateCall(Request, LoadOptions):
    """What `estimate` is asked for."""

    prompt: str | Mapping[int, str] = with_default(Request, "prompt", "any")
    num_frames: int | None = with_default(Request, "num_frames", NUM_FRAMES)
    _: KW_ONLY
    window_batch: int | None = with_default(MigaConfig, "window_batch", None)
