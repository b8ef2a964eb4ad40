"""The first step of the recipe: the VAE, on rendered clips."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bench.tiny import clipvae
from bench.tiny.measures import played, psnr
from bench.tiny.steps import VAE_FILE, Setting, cosine, log, save_state, set_rate, to_video
from miga_engine.measure.truth import truth_curves
from miga_engine.tiny import WEIGHTS_DIR, world


class ClipPool:
    """A pool of rendered clips on the device that is renewed clip by clip; batches are drawn from it."""

    def __init__(self, setting: Setting, size: int, num_frames: int, seed: int, device: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.setting, self.num_frames, self.device = setting, num_frames, device
        shape = (size, num_frames, setting.height, setting.width)
        self.videos = torch.zeros(*shape, 3, dtype=torch.uint8, device=device)
        self.covers = torch.zeros(*shape, dtype=torch.uint8, device=device)
        self.filled = self.next_index = 0

    def renew(self) -> None:
        """Renders one clip and puts it in the place of the oldest."""
        scene = self.setting.sample_scene(self.rng)
        first = int(self.rng.integers(0, 400))
        video, cover, _ = self.setting.render(scene, first, self.num_frames, self.device)
        self.videos[self.next_index], self.covers[self.next_index] = video, (cover * 255).byte()
        self.filled = max(self.filled, self.next_index + 1)
        self.next_index = (self.next_index + 1) % len(self.videos)

    def batch(self, num_clips: int, num_frames: int, crop: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """`[B,3,T,H,W]` video in [-1, 1] and `[B,1,T,H,W]` coverage by the subject, widened; mirrored at random.

        `crop` (height, width) cuts a window near the subject out of every clip.
        """
        videos, covers = [], []
        for i in self.rng.choice(self.filled, num_clips, replace=False):
            start = int(self.rng.integers(0, self.num_frames - num_frames + 1))
            video, cover = (a[int(i), start : start + num_frames] for a in (self.videos, self.covers))
            if self.rng.random() < 0.5:
                video, cover = video.flip(2), cover.flip(2)
            if crop is not None:
                column = int(cover[num_frames // 2].amax(0).argmax()) - int(self.rng.integers(crop[1] - 24))
                column = min(max(column, 0), self.setting.width - crop[1])
                row = int(self.rng.integers(0, self.setting.height - crop[0] + 1))
                video = video[:, row : row + crop[0], column : column + crop[1]]
                cover = cover[:, row : row + crop[0], column : column + crop[1]]
            videos.append(video)
            covers.append(cover)
        widened = F.max_pool2d(torch.stack(covers).float().div_(255.0), 5, 1, 2)
        return to_video(torch.stack(videos)), widened[:, None]


def decoder_loss(params: dict[str, Tensor], x: Tensor, weight: Tensor, subject: Tensor, noise: Tensor) -> Tensor:
    """What the decoder alone is trained on, with latents as they are: L1, of the errors' first differences in space and
    time as well, and of their second difference in time at the `subject`, whose wobble it is; `weight` says what counts
    how much."""
    with torch.no_grad():
        mean, logvar = clipvae.encode_clip(params, x)
    d = clipvae.decode_clip(params, mean + noise * torch.exp(0.5 * logvar.clamp(-12, 4))) - x
    dx = (d[..., 1:] - d[..., :-1]).abs() * weight[..., 1:]
    dy = (d[..., 1:, :] - d[..., :-1, :]).abs() * weight[..., 1:, :]
    dt = d[:, :, 1:] - d[:, :, :-1]
    ddt = (dt[:, :, 1:] - dt[:, :, :-1]).abs() * subject[:, :, 1:-1]
    first = (dt.abs() * weight[:, :, 1:]).mean()
    return (weight * d.abs()).mean() + 0.5 * (dx.mean() + dy.mean()) + first + 4 * ddt.mean()


def contrast_weight(x: Tensor, power: float) -> Tensor:
    """How much more an error counts where the picture has little contrast, `[B,1,T,H,W]`, of mean 1: hills at night are
    as much of the picture as hills at noon. Contrast is the standard deviation over 9×9 pixels, to which 0.1 of the
    range of 2 is added."""
    grey = x.mean(1, keepdim=True)
    mean, square = (F.avg_pool3d(v, (1, 9, 9), 1, (0, 4, 4), count_include_pad=False) for v in (grey, grey.square()))
    weight = (0.1 + (square - mean.square()).clamp(min=0).sqrt()) ** -power
    return weight / weight.mean()


def vae_loss(params: dict[str, Tensor], x: Tensor, weight: Tensor, noise: Tensor, smaller: bool) -> Tensor:
    """L1 + 2·L2 + 0.5·gradient difference, weighted by the subject, + 1e-4·KL.

    With `smaller` the latents at half size are to give the picture at half size (arXiv 2502.14831).
    """
    mean, logvar = clipvae.encode_clip(params, x)
    logvar = logvar.clamp(-12, 4)
    z = mean + noise * torch.exp(0.5 * logvar)
    if smaller:
        z, x, weight = (F.avg_pool3d(v, (1, 2, 2)) for v in (z, x, weight))
    d = clipvae.decode_clip(params, z) - x
    dx = (d[..., 1:] - d[..., :-1]).abs() * weight[..., 1:]
    dy = (d[..., 1:, :] - d[..., :-1, :]).abs() * weight[..., 1:, :]
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weight * (d.abs() + 2 * d.square())).mean() + 0.5 * (dx.mean() + dy.mean()) + 1e-4 * kl


@torch.no_grad()
def unseen_figures(
    params: dict[str, Tensor], setting: Setting, scenes: list[world.Scene], device: str, num_frames: int = 97
) -> dict[str, float]:
    """Means over scenes: PSNR in dB, whole and inside the subject's box, and the subject's jitter in pixels a frame²
    of the reconstruction and of the true clip."""
    rows = []
    for scene in scenes:
        video, mask, _ = setting.render(scene, 1000, num_frames, device)
        x = to_video(video[None])
        with torch.autocast(device, torch.bfloat16):
            rec = clipvae.decode_clip(params, clipvae.encode_clip(params, x)[0])
        x, rec = (v[0].transpose(0, 1).float().cpu() for v in (x, rec))
        whole, box, _ = psnr(x, rec, mask.cpu().numpy())
        clips = (played(rec), video.cpu().numpy())
        jitter = [truth_curves(v, world.caption(scene)).means()["subject_jitter"] for v in clips]
        rows.append([whole, box, *jitter])
    names = ("psnr_db", "psnr_db_subject_box", "jitter", "jitter_true")
    return {name: round(float(v), 3) for name, v in zip(names, np.nanmean(rows, 0), strict=True)}


def _matrix(v: Tensor) -> Tensor:
    """A convolution's kernel as a matrix, a row for each channel that comes out; other parameters as they are."""
    return v.permute(0, 2, 3, 1).flatten(1) if v.ndim == 4 else v


def _kernel(leaf: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_matrix`, channels last in memory."""
    if len(shape) != 4:
        return leaf
    return leaf.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class VaeOptions:
    """How the VAE is trained: what `--minutes` and the other flags of the step set."""

    minutes: float
    lr: float = 1e-3
    batch: int = 1
    decoder_only: bool = False
    contrast_power: float = 0.0
    fresh: bool = False
    compile: bool = True
    seed: int = 0


def train_vae(work: Path, setting: Setting, options: VaeOptions, device: str = "cpu") -> None:
    """Trains the VAE: single frames and 9-frame clips first where it is fresh, then 17-frame clips.

    `decoder_only` goes on from the finished VAE with its encoder as it is, so that latents keep their meaning.
    """
    decoder_only, seed = options.decoder_only, options.seed
    path = work / ("vae_decoder.pt" if decoder_only else "vae.pt")
    saved = torch.load(path, weights_only=True, map_location=device) if path.exists() else None
    if saved is not None:
        params, ema, elapsed, step = saved["params"], saved["ema"], saved["elapsed"], saved["step"]
    else:
        params = clipvae.init_parameters(seed=seed) if options.fresh else load_vae(work, setting, device)
        params = {k: v.to(device) for k, v in params.items()}
        ema, elapsed, step = {k: v.clone() for k, v in params.items()}, 0.0, 0
    # kernels are learned as matrices, a row for each channel that comes out
    shapes = {k: v.shape for k, v in params.items()}
    leaves = {k: _matrix(v).detach().clone() for k, v in params.items()}
    for k, leaf in leaves.items():
        leaf.requires_grad_(not (decoder_only and k.startswith(("encoder.", "conv1."))))
    learned = {k: v for k, v in leaves.items() if v.requires_grad}
    hidden = {k for k, v in learned.items() if v.ndim == 2 and (".residual." in k or ".resample." in k)}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            [v for k, v in learned.items() if k in hidden], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([v for k, v in learned.items() if k not in hidden], betas=(0.9, 0.99), weight_decay=0.0),
    ]
    if saved is not None:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    pool = ClipPool(setting, 600, 17, seed + 1000 + step, device)
    for _ in range(80):
        pool.renew()
    rng = np.random.default_rng(seed + step)
    unseen_rng = np.random.default_rng(777)
    unseen = [setting.sample_scene(unseen_rng) for _ in range(6)]
    crop_size = (setting.height * 3 // 4 // 16 * 16, setting.width * 2 // 3 // 16 * 16)
    if options.compile:
        clipvae.norm_silu = torch.compile(clipvae.norm_silu, dynamic=True)
    last = last_save = time.time()
    running = usual = None
    while elapsed < options.minutes * 60:
        share = elapsed / (options.minutes * 60)
        lr = options.lr * min(1.0, (step + 1) / 100) * cosine(share)
        for optimizer in optimizers:
            set_rate(optimizer, lr)
        params = {k: _kernel(v, shapes[k]) for k, v in leaves.items()}
        pool.renew()
        draw = rng.random()
        if options.fresh and share < 0.2 and draw < max(0.25, 0.8 - 4 * share):
            clips, frames, crop = 24, 1, None
        elif options.fresh and share < 0.12:
            clips, frames, crop = 3, 9, None
        elif rng.random() < 0.75:
            clips, frames, crop = 4, 17, crop_size  # same cost, twice the subjects
        else:
            clips, frames, crop = 2, 17, None
        x, subject = pool.batch(clips * options.batch, frames, crop)
        noise = torch.randn(len(x), 16, (frames + 3) // 4, x.shape[3] // 8, x.shape[4] // 8, device=device)
        contrast = contrast_weight(x, options.contrast_power) if options.contrast_power else 1.0
        with torch.autocast(device, torch.bfloat16):
            if decoder_only:
                loss = decoder_loss(params, x, (1 + 7 * subject) * contrast, subject, noise)
            else:
                loss = vae_loss(params, x, (1 + 6 * subject) * contrast, noise, smaller=rng.random() < 0.25)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_([v for v in leaves.values() if v.grad is not None], 0.5))
        usual = norm if usual is None else usual
        if norm < 4 * usual:  # an outlier would throw the network off for minutes
            for optimizer in optimizers:
                optimizer.step()
        usual = 0.98 * usual + 0.02 * min(norm, 4 * usual)
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), [v.detach() for v in params.values()], 1 - decay)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        now = time.time()
        elapsed += now - last
        last = now
        if step % 100 == 0:
            log(f"step {step} {elapsed / 60:.1f} min lr {lr:.2e} loss {running:.4f}")
        if now - last_save > 180 or elapsed >= options.minutes * 60:
            figures = unseen_figures(ema, setting, unseen, device)
            log(f"step {step} {elapsed / 60:.1f} min unseen {figures}")
            params = {k: v.detach() for k, v in params.items()}
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "figures": figures}
            save_state(path, {**state, "optimizers": [o.state_dict() for o in optimizers]})
            last_save = time.time()


@torch.no_grad()
def latent_statistics(
    params: dict[str, Tensor], setting: Setting, device: str, num_clips: int = 100
) -> tuple[Tensor, Tensor]:
    """Mean and std `[z]` of the latents of clips of the world."""
    rng = np.random.default_rng(4000)
    rows = []
    for _ in range(num_clips):
        video, _, _ = setting.render(setting.sample_scene(rng), int(rng.integers(0, 2000)), 33, device)
        with torch.autocast(device, torch.bfloat16):
            rows.append(clipvae.encode_clip(params, to_video(video[None]))[0])
    z = torch.cat(rows)
    return z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))


def load_vae(work: Path, setting: Setting, device: str = "cpu") -> dict[str, Tensor]:
    """The trained VAE's averaged parameters in training form, their latents like the published VAE's in mean and std;
    where none was trained in `work`, those of the shipped one."""
    decoder, whole = work / "vae_decoder.pt", work / "vae.pt"
    if decoder.exists():
        params = torch.load(decoder, weights_only=True, map_location=device)["ema"]
    elif whole.exists():
        params = torch.load(whole, weights_only=True, map_location=device)["ema"]
        params = clipvae.folded(params, *latent_statistics(params, setting, device))
    else:
        shipped = load_file(WEIGHTS_DIR / VAE_FILE)
        params = clipvae.from_official({k: v.float().to(device) for k, v in shipped.items()})
    return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in params.items()}
