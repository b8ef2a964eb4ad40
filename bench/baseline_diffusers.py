"""The same video by a plain loop over diffusers' networks, as it is commonly written: the rival of bench_engine.py.

One window after another, two calls for guidance, one diffusers `UniPCMultistepScheduler` a latent frame, the text
embedded and every modulation written out by token inside the network, the whole clip decoded at the end. Schedule,
windows, noise, guidance frames, weights, dtypes and attention (SDPA) are the engine's; nothing in it is slower than
such a loop has to be: prompts are encoded once, no gradients are kept, and windows of one noise level get one timestep.

`check` holds its latents against the engine's before anything is timed: in float32 the largest difference is at most
TOLERANCE of the largest latent; in other dtypes the engine is at most twice as far from the float32 latents as the
loop is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from miga_engine import Engine
from miga_engine.models.wan import layouts, vae_layouts
from miga_engine.models.wan.dit import WanDiTConfig
from miga_engine.models.wan.vae import StreamDecoder
from miga_engine.noise import CounterNoise, Purpose
from miga_engine.request import Request
from miga_engine.runtime.window_plan import guidance_indices, plan_windows
from miga_engine.weights.checkpoint import Checkpoint

TOLERANCE = 1e-4


class _Keys(Checkpoint):
    """The names and shapes of a module's parameters, for the layouts to translate."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(Path(type(module).__name__))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def read(self, key: str) -> Tensor:
        raise NotImplementedError("only names are asked for")

    def stored_dtype(self, key: str) -> torch.dtype:
        return torch.float32


def _fill(module: nn.Module, official: Mapping[str, Tensor], layout: Callable[[Checkpoint], Checkpoint]) -> None:
    names = layout(_Keys(module))
    module.load_state_dict({names.key_in_file(key): tensor for key, tensor in official.items()})
    module.eval().requires_grad_(False)


def transformer(
    config: WanDiTConfig, official: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype
) -> WanTransformer3DModel:
    """diffusers' network with weights of official names, in the dtypes that its own `from_pretrained` gives it."""
    with torch.device(device):
        network = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            cross_attn_norm=config.cross_attn_norm,
            qk_norm="rms_norm_across_heads" if config.qk_norm else None,
            eps=config.eps,
        )
    _fill(network, official, layouts.official_transformer)
    for name, parameter in network.named_parameters():
        if not set(name.split(".")) & set(network._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return network


@dataclass
class LatentFrame:
    """A latent frame [1, C, H, W] with its number in the video, its step index and its own solver."""

    number: int
    sample: Tensor
    step: int
    scheduler: UniPCMultistepScheduler


class DiffusersLoop:
    """`latents` and `video` for a resolved request of an engine, whose text encoder and weight files it shares.

    Of the method it knows what the request of bench_engine.py uses: one prompt, UniPC, no reflection.
    """

    def __init__(self, engine: Engine) -> None:
        bundle = self.bundle = engine.bundle
        self.device, self.dtype = engine.device, bundle.dtype
        weights = load_file(bundle.path / "diffusion_pytorch_model.safetensors")
        self.transformer = transformer(bundle.transformer.config, weights, self.device, self.dtype)
        sizes = bundle.vae.config
        mean, std = map(list, sizes.statistics())
        self.vae = AutoencoderKLWan(
            base_dim=sizes.dim,
            z_dim=sizes.z_dim,
            dim_mult=list(sizes.dim_mult),
            num_res_blocks=sizes.num_res_blocks,
            temperal_downsample=list(sizes.temporal_downsample),
            latents_mean=mean,
            latents_std=std,
        )
        _fill(self.vae, load_file(bundle.path / "Wan2.1_VAE.safetensors"), vae_layouts.official_vae)
        self.vae.to(self.device)
        self.num_forwards = 0

    @torch.inference_mode()
    def video(self, request: Request) -> Tensor:
        """Frames uint8 [T, H, W, 3] on the CPU."""
        return self.decode(self.latents(request))[: request.num_frames].cpu()

    @torch.inference_mode()
    def latents(self, request: Request) -> Tensor:
        """Clean latents [n, C, h, w] float32."""
        self._start(request)
        config = request.miga
        width, window = config.zigzag_width, self.bundle.window_frames
        handoff = request.num_inference_steps - config.stage2_steps
        local = window - config.guidance_frames

        clip = self._noise_frames(Purpose.SEED_CLIP, range(window))
        for _ in range(request.num_inference_steps):
            self._pass(clip, window, 0)
        num_groups = min(window // width, handoff - 1)
        queue = [self._renoised(f, Purpose.WARMUP, num_groups - f.number // width) for f in clip[: num_groups * width]]
        queue += self._pushed(queue)
        while queue[0].step < handoff - 1:
            phase = (len(queue) - local) % self.stride if len(queue) >= local else 0
            self._pass(queue, local, phase, config.guidance_frames)
            queue += self._pushed(queue)

        num_latents = self.bundle.num_latent_frames(request.num_frames)
        finished: list[LatentFrame] = []
        passes = 0
        while len(finished) < max(num_latents, window):
            self._pass(queue, local, passes % self.stride if config.moving_phase else 0, config.guidance_frames)
            passes += 1
            finished += [self._fresh(f.number, f.sample, f.step) for f in queue[:width]]
            queue = queue[width:]
            queue += self._pushed(queue)

        frames = finished[: max(num_latents, window)]
        for level in range(config.stage2_steps):
            self._pass(frames, window, level % self.stride if config.moving_phase else 0)
        if config.refine_steps:
            step = request.num_inference_steps - config.refine_steps
            frames = [self._renoised(f, Purpose.REFINE, step) for f in frames]
            for level in range(config.refine_steps):
                self._pass(frames, window, level % self.stride if config.moving_phase else 0)
        return torch.cat([f.sample for f in frames[:num_latents]])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, C, h, w] -> frames uint8 [T, H, W, 3]."""
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        scaled = (latents * std + mean).transpose(0, 1)[None]
        frames = self.vae.decode(scaled, return_dict=False)[0][0]
        return (frames.add(1).mul(127.5).round().clamp(0, 255)).to(torch.uint8).permute(1, 2, 3, 0)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """One call of the network: latents [1, C, F, h, w], timesteps [1] or [1, tokens], context [1, T, D]."""
        self.num_forwards += 1
        return self.transformer(latents, timesteps, context, return_dict=False)[0].float()

    def step(self, frame: LatentFrame, velocity: Tensor) -> Tensor:
        """The frame's sample after its solver's next step."""
        timestep = frame.scheduler.timesteps[frame.step]
        return frame.scheduler.step(velocity, timestep, frame.sample, return_dict=False)[0]

    def _start(self, request: Request) -> None:
        config = request.miga
        if (
            config.self_reflection
            or config.tail_signal
            or config.history_guidance != "off"
            or config.past_context
            or (config.commit, config.window_order, config.warmup) != ("leading", "parallel", "grow")
            or (request.solver, list(request.prompt)) != ("unipc", [0])
        ):
            raise ValueError(
                "the diffusers loop knows UniPC, one prompt, no padded windows, no reflection, no signal in the tail, "
                "no guidance on history"
            )
        self.request = request
        self.stride = config.stride_of(self.bundle.window_frames)
        factor = self.bundle.spatial_factor
        self.shape = (self.bundle.latent_channels, request.height // factor, request.width // factor)
        self.noise = CounterNoise(request.seed, self.shape, self.device)
        texts = self.bundle.encode_prompts([request.negative_prompt, request.prompt[0]])
        padding = self.bundle.transformer.config.text_len - texts.shape[1]
        self.negative, self.positive = F.pad(texts, (0, 0, 0, padding)).to(self.dtype).split(1)
        self.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift
        )
        # The official samplers begin at 0.999 of the way to pure noise.
        sigmas = np.linspace(0.999, 0, request.num_inference_steps + 1)[:-1]
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device)

    def _fresh(self, number: int, sample: Tensor, step: int) -> LatentFrame:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_begin_index(step)
        return LatentFrame(number, sample, step, scheduler)

    def _noise_frames(self, purpose: Purpose, numbers: Sequence[int]) -> list[LatentFrame]:
        noise = self.noise(purpose, np.asarray(numbers)).split(1)
        return [self._fresh(number, sample, 0) for number, sample in zip(numbers, noise, strict=True)]

    def _pushed(self, queue: list[LatentFrame]) -> list[LatentFrame]:
        first = queue[-1].number + 1
        return self._noise_frames(Purpose.PUSH, range(first, first + self.request.miga.zigzag_width))

    def _renoised(self, frame: LatentFrame, purpose: Purpose, step: int) -> LatentFrame:
        sigma = self.scheduler.sigmas[step]
        noise = self.noise(purpose, np.array([frame.number]))
        return self._fresh(frame.number, (1 - sigma) * frame.sample + sigma * noise, step)

    def _pass(self, frames: list[LatentFrame], window: int, phase: int, num_guidance: int = 0) -> None:
        """Every frame one step further; all windows read the frames as they were before."""
        config, scale = self.request.miga, self.request.guidance_scale
        after: list[Tensor] = []
        offset = config.commit_offset_of(self.bundle.window_frames)
        for start, commit_start, commit_stop in plan_windows(len(frames), window, self.stride, phase, offset=offset):
            guidance = guidance_indices(
                start, num_guidance, config.zigzag_width, config.guidance_offset, config.guidance_spacing
            )
            length = window if guidance or not num_guidance else self.bundle.window_frames
            read = [frames[i] for i in guidance] + frames[start : start + length]
            latents = torch.stack([f.sample[0] for f in read], dim=1)[None].to(self.dtype)
            timesteps = self._timesteps([f.step for f in read])
            conditional = self.forward(latents, timesteps, self.positive)
            unconditional = self.forward(latents, timesteps, self.negative)
            velocity = unconditional + scale * (conditional - unconditional)
            for i in range(commit_start, commit_stop):
                after.append(self.step(frames[i], velocity[:, :, i - start + len(guidance)]))
        for frame, sample in zip(frames, after, strict=True):
            frame.sample = sample
            frame.step += 1

    def _timesteps(self, steps: list[int]) -> Tensor:
        """[1] for frames of one noise level, else by token, [1, frames · tokens of a frame]."""
        if len(set(steps)) == 1:
            return self.scheduler.timesteps[steps[:1]]
        _, patch_height, patch_width = self.bundle.transformer.config.patch_size
        tokens = (self.shape[1] // patch_height) * (self.shape[2] // patch_width)
        return self.scheduler.timesteps[steps].repeat_interleave(tokens)[None]


def engine_latents(engine: Engine, request: Request) -> tuple[Tensor, Tensor]:
    """What the engine gives its decoder, [n, C, h, w] float32, and the video, uint8 [T, H, W, 3] on the CPU."""
    pushed: list[Tensor] = []
    push = StreamDecoder.push

    def record(decoder: StreamDecoder, latents: Tensor) -> Tensor:
        pushed.append(latents[0].transpose(0, 1).clone())
        return push(decoder, latents)

    with mock.patch.object(StreamDecoder, "push", record):
        frames = [chunk.frames.cpu() for chunk in engine.run(request)]
    return torch.cat(pushed), torch.cat(frames)


def check(engine: Engine, loop: DiffusersLoop, request: Request) -> float:
    """Largest difference of the latents as a share of the largest latent (other dtypes: of the rms, see the module).

    Raises AssertionError where the loop does not make the engine's video.
    """
    ours, frames = engine_latents(engine, request)
    theirs = loop.latents(request)
    assert ours.shape == theirs.shape, f"the engine made latents {tuple(ours.shape)}, the loop {tuple(theirs.shape)}"
    if engine.bundle.dtype == torch.float32:
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert difference <= TOLERANCE, f"latents of engine and diffusers loop differ by {difference:.1e}: not timed"
        levels = (frames.int() - loop.decode(theirs)[: len(frames)].cpu().int()).abs().max().item()
        assert levels <= 2, f"frames of engine and diffusers loop differ by {levels} of 255 levels: not timed"
        return difference
    exact_engine = Engine.from_pretrained(engine.name, engine.device, torch.float32)
    exact, _ = engine_latents(exact_engine, request)
    ours_off, theirs_off = (((x - exact).norm() / exact.norm()).item() for x in (ours, theirs))
    assert ours_off <= 2 * theirs_off, (
        f"{engine.bundle.dtype}: the engine is {ours_off:.1e} from float32, the loop {theirs_off:.1e}: not timed"
    )
    return ours_off
