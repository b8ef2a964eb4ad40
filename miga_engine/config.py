"""Options of a run as frozen records. An option is one field of one of them: `options` makes everything else of it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from miga_engine.errors import ConfigError
from miga_engine.fields import Checked, FromPreset, option, weighted_files

if TYPE_CHECKING:
    import torch

ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "onednn", "cudnn", "xformers", "flash", "sage", "reference")
"""Who may compute attention; `miga_engine.ops.frame_attention` says what each needs."""

PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")
"""What may lie apart from a model, by the names of the options that say where."""

DTYPES = ("float32", "bfloat16", "float16")
"""In which networks may be held."""

MAX_OPTION = 10_000
"""Of every count in MigaConfig: buffers are sized by them."""

NUM_FRAMES = 240
"""Video frames where nobody says how many."""

MAX_FRAME = 10**9
"""Number of the last video frame: two years of video."""


def as_texts(record: object, names: type[Any]) -> None:
    """Make texts of the paths, dtypes and devices of a record, those of its fields that another record has."""
    for name in (field.name for field in dataclasses.fields(names)):
        value = getattr(record, name, None)
        if isinstance(value, os.PathLike) or type(value).__module__ == "torch":
            object.__setattr__(record, name, str(value).removeprefix("torch."))


@dataclass(frozen=True)
class LoadOptions(Checked):
    """Which model, where and how it computes."""

    model: str | os.PathLike[str] = option(
        "tiny", "'tiny', the embedded model; a Wan2.1 or VideoCrafter2 folder; a ComfyUI folder; a weights file; or a "
        "name on Hugging Face's hub, such as Wan-AI/Wan2.1-T2V-1.3B", metavar="NAME|PATH", is_recorded=False,
    )  # fmt: skip
    device: str | torch.device | None = option(
        None, "cuda, cuda:1 or cpu", shown="cuda where there is one", metavar="DEVICE", is_recorded=False
    )
    dtype: str | torch.dtype | None = option(
        None, "of the transformer", choices=DTYPES, shown="bfloat16 on GPUs, float32 on CPUs"
    )
    _: KW_ONLY
    transformer: str | os.PathLike[str] | None = option(None, "the transformer, a file or a folder",
                                            shown="in the model", metavar="PATH", is_recorded=False)  # fmt: skip
    transformer_2: str | os.PathLike[str] | None = option(None, "the network for low noise of Wan2.2 A14B",
                                            shown="in the model", metavar="PATH", is_recorded=False)  # fmt: skip
    vae: str | os.PathLike[str] | None = option(None, "the VAE, or what `decoder` names", shown="in the model",
                                                metavar="PATH", is_recorded=False)  # fmt: skip
    text_encoder: str | os.PathLike[str] | None = option(None, "the text encoder", shown="in the model",
                                                         metavar="PATH", is_recorded=False)  # fmt: skip
    tokenizer: str | os.PathLike[str] | None = option(
        None, "the tokenizer.json or spiece.model", shown="in the model, or in the text encoder's file", metavar="PATH",
        is_recorded=False,
    )  # fmt: skip
    lora: Any = option(
        None, "LoRA file to merge into the transformer, and how strongly (default: 1); several act in their order",
        kind=object, metavar="FILE[:STRENGTH]", is_repeated=True, is_recorded=False,
    )  # fmt: skip
    decoder: str = option(
        "vae", "who makes pictures of latents; tae: TAEW2.1, a tiny decoder for previews, whose pictures differ",
        choices=("vae", "tae"),
    )  # fmt: skip
    experts: str = option("resident", "of Wan2.2 A14B: both networks on the GPU, or one at a time, the other copied in "
                          "its place where it is needed; without effect on CPUs", choices=("resident", "swap"),
                          is_recorded=False)  # fmt: skip
    download: bool = option(False, "fetch a model of Hugging Face's hub that is not in the local cache",
                            is_recorded=False)  # fmt: skip
    revision: str | None = option(None, "branch, tag or commit of a model of the hub", shown="main", metavar="NAME",
                                  is_recorded=False)  # fmt: skip
    cache_dir: str | None = option(None, "the hub's cache", shown="HF_HUB_CACHE, or hub in HF_HOME", metavar="FOLDER",
                                   is_recorded=False)  # fmt: skip
    preset: str | None = option(None, "set of defaults", shown="by model")
    attention: str = option(
        "auto", "who computes self-attention; auto: the fastest exact one installed, timed at the real shape once on "
        "each GPU; any other is obeyed or refused", choices=ATTENTION_BACKENDS,
    )  # fmt: skip
    vae_dtype: str | torch.dtype = option(
        "float32", "in which frames are decoded; tf32, on GPUs alone: float32 with convolutions that round to TF32",
        choices=("float32", "tf32", "bfloat16", "float16"),
    )  # fmt: skip
    compile: bool = option(False, "run the transformer through torch.compile, which compiles at the first passes")
    capture: bool = option(
        True, "replay forwards of one shape as CUDA graphs; without effect on CPUs", is_recorded=False
    )

    def __post_init__(self) -> None:
        as_texts(self, LoadOptions)
        object.__setattr__(self, "lora", weighted_files("lora", self.lora))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Checked):
    """How one latent frame goes from noise to clean. None: the preset's."""

    solver: FromPreset[str] = option(None, "unipc, dpmpp_2m, euler, lcm or ddim", group="sampling", metavar="NAME")
    num_inference_steps: FromPreset[int] = option(
        None, "denoising steps of a frame", least=1, most=1000, unit="steps", group="sampling", metavar="T"
    )
    shift: FromPreset[float] = option(None, "of the noise levels of flow models", group="sampling", metavar="X")
    sigmas: FromPreset[Sequence[float] | str] = option(
        None, "noise levels of the steps in place of evenly spaced ones, such as 1,0.94,0.83,0.62: numbers that "
        "descend from at most 1; shift has no part in them", kind=tuple, most=1, group="sampling", metavar="LIST",
    )  # fmt: skip
    denoising_steps: FromPreset[Sequence[float] | str] = option(
        None, "timesteps of the steps in place of evenly spaced ones, such as 1000,750,500,250: numbers that descend "
        "from at most 1000, of which shift makes noise levels; at a shift of 1 they are these, in thousandths",
        kind=tuple, most=1000, group="sampling", metavar="LIST",
    )  # fmt: skip
    guidance_scale: FromPreset[float] = option(None, "classifier-free guidance; 1 = off", group="sampling", metavar="W")
    eta: FromPreset[float] = option(None, "ddim only: share of fresh noise in a step", group="sampling", metavar="X")
    use_scale_array: FromPreset[bool] = option(
        None, "ddim only: VideoCrafter2's scale of x0 by level (1 → 0.7 over 400 timesteps)", group="sampling"
    )


_count = functools.partial(option, most=MAX_OPTION)


@dataclass(frozen=True)
class MigaConfig(Checked):
    """How short windows become an endless video (MIGA, arXiv 2605.18233; symbols of the paper in brackets).

    All counts are latent frames unless the text says otherwise; None means a default that follows from the rest.
    """

    zigzag_width: int = _count(7, "latent frames that share one noise level in Stage 1 [L_zig]", least=1)
    passes_per_advance: int = _count(
        1, "passes over the queue for each group that leaves it, which makes neighbouring groups so many noise levels "
        "apart: 1 is MIGA's zigzag queue, 5 in groups of 5 the asynchronous schedule of SkyReels-V2-DF", least=1,
    )  # fmt: skip
    stage2_steps: int = _count(10, "unified passes after Stage 1: the hand-off is this many steps before clean [tau_e]")
    refine_steps: int = _count(0, "steps of the release's refine pass, which noises clean latents once more; 0 = off")
    guidance_frames: int = _count(4, "distant cleaner frames put before a Stage-1 window, read only [m_guid]")
    guidance_offset: int | None = _count(
        None, "distance of the nearest guidance frame", shown="half the zigzag width", least=1
    )
    guidance_spacing: int = _count(1, "noise levels between two guidance frames", least=1)
    guidance_anchor: bool = option(
        False,
        "let the farthest guidance frame be the prompt's first frame, clean, "
        "and let searches read it too: it holds what the prompt leaves open",
    )
    anchor_frames: int = _count(1, "latent frames that the anchor holds, from the prompt's first on", least=1)
    reference_sigma: float | None = option(
        None, "noise level sigma of the frames that are only read, the anchor and what a video begins with, of which "
        "the network is told: 0.02 for SkyReels-V2-DF, 0 for models that were trained with a clean first frame",
        shown="none, and the network is told the last step's", most=1,
    )  # fmt: skip
    stride: int | None = _count(None, "latent frames between window starts", shown="half the model's window", least=1)
    tail_signal: float = option(
        0.0, "share of the queue's cleanest frame, as predicted clean, in the noise that a new frame of its prompt "
        "begins as: what the prompt leaves open, and where things are, no longer change with the noise", most=1,
    )  # fmt: skip
    history_guidance: str = option(
        "off", "what the unconditional branch of guidance reads noise in place of, so that guidance_scale pushes "
        "towards it as towards the prompt: nothing, the guidance frames and the anchor (distant), or all cleaner "
        "frames before those that a window keeps, as far as they are of the same prompt; without effect at a scale "
        "of 1", choices=("off", "distant", "all"),
    )  # fmt: skip
    moving_phase: bool = option(True, "shift the cuts by one frame a pass, so that no seam stays in one place")
    commit: str = option(
        "leading",
        "which end of a window is kept (trailing: FIFO-Diffusion's look-ahead)",
        choices=("leading", "trailing"),
    )
    commit_offset: int = _count(
        0, "first latent frames of a window that it only reads, for the window before keeps them: at 0 (paper) the "
        "cleaner end is kept, at most, window − guidance frames − stride, the noisier end, between them the middle; "
        "-1: as many as the other options allow", least=-1,
    )  # fmt: skip
    past_context: bool = option(
        False, "with a commit_offset: windows at the head of the queue also read that many frames that have left it, "
        "cleaner than any in it (at the beginning copies of the first frame, as in FIFO)",
    )  # fmt: skip
    window_order: str = option(
        "parallel",
        "whether later windows of a pass see earlier commits (sequential) or not",
        choices=("parallel", "sequential"),
    )
    window_batch: int | None = _count(
        None, "windows that go through the network together", shown="on a GPU what fits its memory, on a CPU 1", least=1
    )
    warmup: str = option(
        "grow",
        "the first queue: grown behind an ordinary clip, or the same, and the clip is what the video begins with, so "
        "that its frames come out as soon as it is made (clip), or copies of its first frame (FIFO), or noise from the "
        "first group on, with no clip before it (Rolling Forcing)",
        choices=("grow", "clip", "copies", "noise"),
    )
    self_reflection: bool = option(True, "watch the consistency score, and search again where it falls [DCE]")
    score_drop: float = option(0.01, "fall of the score that triggers a search [delta_adju]", least=None)
    judge_step: int = _count(10, "step index at which a group of latent frames is judged", least=1)
    reference_groups: int = _count(2, "groups just before the judged one that it is compared with", least=1)
    candidates: int = _count(3, "continuations tried by one search [K]", least=1)
    search_baseline: str = option(
        "judged",
        "what a candidate must exceed: the score of the judged frames (paper), or that of their own noise when it is "
        "continued as candidates are, from references that stand still",
        choices=("judged", "continued"),
    )
    judge: str = option(
        "latent",
        "what is compared: latents (paper), or x0 predictions, which carry far less noise",
        choices=("latent", "x0"),
    )
    channels: str = option(
        "mean", "whether channels are averaged before the comparison (paper) or all count", choices=("mean", "all")
    )
    prompt_blend_frames: int = _count(0, "video frames over which the text runs from one prompt to the next")

    @property
    def num_continuations(self) -> int:
        """Continuations that a search makes, that of the judged frames' own noise included."""
        return self.candidates + (self.search_baseline == "continued")

    def num_past(self, num_guidance: int, commit_start: int) -> int:
        """How many first frames of a window, of which so many are guidance frames, `history_guidance` is about."""
        return {"off": 0, "distant": num_guidance, "all": commit_start}[self.history_guidance]

    def stride_of(self, window_frames: int) -> int:
        """Latent frames between two windows of a pass of a model with this native window."""
        return self.stride or max(1, min(window_frames // 2, window_frames - self.guidance_frames))

    def most_commit_offset(self, window_frames: int) -> int:
        """The offset that keeps the noisier end: local frames of a window less its stride."""
        return window_frames - self.guidance_frames - self.stride_of(window_frames)

    def commit_offset_of(self, window_frames: int) -> int:
        """Frames that a window of a model with this native window leaves to the one before it."""
        if self.commit_offset >= 0:
            return self.commit_offset
        is_free = self.commit == "leading" and self.window_order == "parallel"
        return self.most_commit_offset(window_frames) if is_free else 0

    def check(self, num_steps: int, window_frames: int) -> None:
        """Refuse what cannot run with this many steps and this native window; ConfigError names the option."""
        handoff_step = num_steps - self.stage2_steps
        local_frames = window_frames - self.guidance_frames
        most_offset = self.most_commit_offset(window_frames)
        apart = self.passes_per_advance
        judged = self.judge_step + self.reference_groups * apart if self.self_reflection else 0
        is_judged = judged <= num_steps
        problems = (
            (num_steps < 2, f"num_inference_steps is {num_steps}, and a queue needs at least 2"),
            (handoff_step < 2, f"stage2_steps {self.stage2_steps} leaves Stage 1 {handoff_step} of {num_steps} steps"
             f"; use at most {num_steps - max(2, judged if is_judged else 0)}" + ("" if is_judged else
             f" and switch self_reflection off, whose judge_step {self.judge_step} with {self.reference_groups} "
             f"reference_groups takes {judged} steps")),
            (self.refine_steps > num_steps - 1, f"refine_steps {self.refine_steps} must be less than {num_steps}"),
            (self.zigzag_width > window_frames, f"zigzag_width {self.zigzag_width} exceeds the model's window of "
             f"{window_frames} latent frames"),
            (local_frames < 1, f"guidance_frames {self.guidance_frames} leaves no room in the model's window of "
             f"{window_frames} latent frames"),
            (self.stride is not None and self.stride > local_frames, f"stride {self.stride} exceeds the "
             f"{local_frames} local frames of a window (window {window_frames} − guidance_frames "
             f"{self.guidance_frames})"),
            (handoff_step % apart > 0, f"passes_per_advance {apart} does not divide the {handoff_step} steps of Stage "
             f"1 (num_inference_steps {num_steps} − stage2_steps {self.stage2_steps}): change one of them"),
            (handoff_step < 2 * apart, f"passes_per_advance {apart} leaves one group in the {handoff_step} steps of "
             f"Stage 1: use at most {handoff_step // 2}"),
            (self.self_reflection and self.judge_step % apart > 0, f"judge_step {self.judge_step} must be a multiple "
             f"of passes_per_advance {apart}, at which groups are judged"),
            (judged > handoff_step, f"judge_step "
             f"{self.judge_step} with {self.reference_groups} reference_groups reaches past the hand-off at step "
             f"{handoff_step}; lower one, or switch self_reflection off"),
            (self.guidance_anchor and self.anchor_frames > self.guidance_frames, f"anchor_frames {self.anchor_frames} "
             f"take the places of guidance_frames, of which there are {self.guidance_frames}: raise these"),
            (self.commit == "trailing" and self.guidance_frames > 0, "commit 'trailing' needs guidance_frames 0"),
            (self.commit_offset > 0 and self.commit == "trailing", f"commit_offset {self.commit_offset} moves the "
             f"frames that a window keeps, and commit 'trailing' fixes them: give one of the two"),
            (self.commit_offset > 0 and self.window_order == "sequential", f"commit_offset {self.commit_offset} needs "
             f"window_order 'parallel'"),
            (self.commit_offset > most_offset, f"commit_offset {self.commit_offset} exceeds {most_offset}, the "
             f"local frames of a window less its stride"),
        )  # fmt: skip
        for is_wrong, sentence in problems:
            if is_wrong:
                raise ConfigError(sentence)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(Checked):
    """How frames leave a run; none of it decides over what they show."""

    chunk_frames: int | None = option(
        None, "video frames of a chunk, the last may be shorter", shown="as they are decoded", least=1, most=MAX_FRAME,
        unit="video frames", is_hosted=False,
    )  # fmt: skip
    overlap_decode: bool | None = option(
        None, "decode in a second thread beside the network: the frames are the same, all but the first come one pass "
        "later", shown="on CUDA", group="output",
    )  # fmt: skip
    stop_on_drift: float | None = option(
        None, "stop with DriftError once colours have moved by more than this share of their range since the beginning "
        "of the prompt", group="output", metavar="X",
    )  # fmt: skip
    warn_on_drift: float | None = option(
        None, "warn, once a prompt, when colours have moved by more than this share of their range since the beginning "
        "of the prompt, and go on", group="output", metavar="X",
    )  # fmt: skip


def fifo_config(base: MigaConfig, window_frames: int) -> MigaConfig:
    """FIFO-Diffusion (arXiv 2405.11473) as a configuration: one frame a level, look-ahead denoising, nothing else."""
    return dataclasses.replace(
        base, zigzag_width=1, passes_per_advance=1, stage2_steps=0, refine_steps=0, guidance_frames=0,
        guidance_anchor=False, self_reflection=False, commit="trailing", commit_offset=0, warmup="copies",
        moving_phase=False, tail_signal=0.0, history_guidance="off", past_context=False,
        stride=max(1, window_frames // 2),
    )  # fmt: skip


def replace_options(config: MigaConfig, options: Mapping[str, Any]) -> MigaConfig:
    """`config` with `options` changed; an unknown name raises ConfigError and lists the known ones."""
    known = {option.name for option in dataclasses.fields(MigaConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}")
    return dataclasses.replace(config, **options)
