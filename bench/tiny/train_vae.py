"""The first step of the recipe: the VAE, on rendered clips."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bench.tiny import clipvae
from bench.tiny.steps import HEIGHT, VAE_FILE, WIDTH, log, save_state
from miga_engine.measure.truth import truth_curves
from miga_engine.tiny import WEIGHTS_DIR, world


class ClipPool:
    """A pool of rendered clips that is renewed one clip a step; batches are drawn from it."""

    def __init__(self, size: int, num_frames: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.size, self.num_frames = size, num_frames
        self.clips: list[tuple[np.ndarray, np.ndarray]] = []
        self.next_index = 0

    def renew(self) -> None:
        """Renders one clip and puts it in the place of the oldest."""
        scene = world.sample_scene(self.rng)
        video, mask = world.render(scene, int(self.rng.integers(0, 400)), self.num_frames, HEIGHT, WIDTH)
        clip = (video, (mask * 255).astype(np.uint8))
        if len(self.clips) < self.size:
            self.clips.append(clip)
        else:
            self.clips[self.next_index] = clip
            self.next_index = (self.next_index + 1) % self.size

    def batch(self, num_clips: int, num_frames: int, crop: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """`[B,3,T,H,W]` video in [-1, 1] and `[B,1,T,H,W]` coverage by the subject, widened; mirrored at random.

        `crop` (height, width) cuts a window near the subject out of every clip.
        """
        videos, masks = [], []
        for i in self.rng.choice(len(self.clips), num_clips, replace=False):
            start = int(self.rng.integers(0, self.num_frames - num_frames + 1))
            video, mask = (a[start : start + num_frames] for a in self.clips[i])
            if self.rng.random() < 0.5:
                video, mask = video[:, :, ::-1], mask[:, :, ::-1]
            if crop is not None:
                column = int(mask[num_frames // 2].max(0).argmax()) - int(self.rng.integers(crop[1] - 24))
                column = min(max(column, 0), WIDTH - crop[1])
                row = int(self.rng.integers(0, HEIGHT - crop[0] + 1))
                video = video[:, row : row + crop[0], column : column + crop[1]]
                mask = mask[:, row : row + crop[0], column : column + crop[1]]
            videos.append(video.copy())
            masks.append(mask.copy())
        x = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0).contiguous()
        m = torch.from_numpy(np.stack(masks)).float().div_(255.0)
        return x, F.max_pool2d(m, 5, 1, 2)[:, None]


def decoder_loss(params: dict[str, Tensor], x: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """What the decoder alone is trained on, with latents as they are: L1, of the errors' first differences in space and
    time as well, and of their second difference in time at the subject, whose wobble it is. `weight` is 8 there."""
    with torch.no_grad():
        mean, logvar = clipvae.encode_clip(params, x)
    d = clipvae.decode_clip(params, mean + noise * torch.exp(0.5 * logvar.clamp(-12, 4))) - x
    subject = (weight - 1) / 7
    dx = (d[..., 1:] - d[..., :-1]).abs() * weight[..., 1:]
    dy = (d[..., 1:, :] - d[..., :-1, :]).abs() * weight[..., 1:, :]
    dt = d[:, :, 1:] - d[:, :, :-1]
    ddt = (dt[:, :, 1:] - dt[:, :, :-1]).abs() * subject[:, :, 1:-1]
    first = (dt.abs() * weight[:, :, 1:]).mean()
    return (weight * d.abs()).mean() + 0.5 * (dx.mean() + dy.mean()) + first + 4 * ddt.mean()


def vae_loss(params: dict[str, Tensor], x: Tensor, weight: Tensor, noise: Tensor) -> Tensor:
    """L1 + 2·L2 + 0.5·gradient difference, weighted by the subject, + 1e-4·KL."""
    mean, logvar = clipvae.encode_clip(params, x)
    logvar = logvar.clamp(-12, 4)
    rec = clipvae.decode_clip(params, mean + noise * torch.exp(0.5 * logvar))
    d = rec - x
    dx = (d[..., 1:] - d[..., :-1]).abs() * weight[..., 1:]
    dy = (d[..., 1:, :] - d[..., :-1, :]).abs() * weight[..., 1:, :]
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weight * (d.abs() + 2 * d.square())).mean() + 0.5 * (dx.mean() + dy.mean()) + 1e-4 * kl


@torch.no_grad()
def unseen_figures(params: dict[str, Tensor], scenes: list[world.Scene], num_frames: int = 97) -> dict[str, float]:
    """Means over scenes: PSNR in dB, whole and inside the subject's box, and the subject's jitter in pixels a frame²
    of the reconstruction and of the true clip."""
    rows = []
    for scene in scenes:
        video, mask = world.render(scene, 1000, num_frames, HEIGHT, WIDTH)
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            rec = clipvae.decode_clip(params, clipvae.encode_clip(params, x)[0]).clamp(-1, 1)
        error = ((rec - x) / 2).square().mean(1)[0].numpy()  # [T,H,W]
        inside = []
        for e, m in zip(error, mask, strict=True):
            rows_, columns = np.flatnonzero(m.max(1) > 0.1), np.flatnonzero(m.max(0) > 0.1)
            inside.append(e[rows_[0] : rows_[-1] + 1, columns[0] : columns[-1] + 1].mean())
        played = rec[0].permute(1, 2, 3, 0).mul(127.5).add(127.5).round().to(torch.uint8).numpy()
        jitter = [truth_curves(v, world.caption(scene)).means()["subject_jitter"] for v in (played, video)]
        rows.append([-10 * np.log10(error.mean()), -10 * np.log10(np.mean(inside)), *jitter])
    names = ("psnr_db", "psnr_db_subject_box", "jitter", "jitter_true")
    return {name: round(float(v), 3) for name, v in zip(names, np.mean(rows, 0), strict=True)}


def _matrix(v: Tensor) -> Tensor:
    """A convolution's kernel as a matrix, a row for each channel that comes out; other parameters as they are."""
    return v.permute(0, 2, 3, 1).flatten(1) if v.ndim == 4 else v


def _kernel(leaf: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_matrix`, channels last in memory."""
    if len(shape) != 4:
        return leaf
    return leaf.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def train_vae(
    work: Path, minutes: float, peak_lr: float, seed: int = 0, compile_step: bool = True, decoder_only: bool = False
) -> None:
    """Trains the VAE: single frames and 9-frame clips first, then 17-frame clips.

    `decoder_only` goes on from the finished VAE with its encoder as it is, so that latents keep their meaning.
    """
    path = work / ("vae_decoder.pt" if decoder_only else "vae.pt")
    params = load_vae(work) if decoder_only else clipvae.init_parameters(seed=seed)
    ema = {k: v.clone() for k, v in params.items()}
    elapsed, step = 0.0, 0
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if saved is not None:
        params, ema, elapsed, step = saved["params"], saved["ema"], saved["elapsed"], saved["step"]
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
    pool = ClipPool(600, 17, seed + 1000 + step)
    for _ in range(80):
        pool.renew()
    rng = np.random.default_rng(seed + step)
    unseen_rng = np.random.default_rng(777)
    unseen = [world.sample_scene(unseen_rng) for _ in range(6)]
    if compile_step:
        clipvae.norm_silu = torch.compile(clipvae.norm_silu, dynamic=True)
    last = last_save = time.time()
    running = usual = None
    while elapsed < minutes * 60:
        share = elapsed / (minutes * 60)
        lr = peak_lr * min(1.0, (step + 1) / 100) * max(0.01, 0.5 * (1 + float(np.cos(np.pi * share))))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        params = {k: _kernel(v, shapes[k]) for k, v in leaves.items()}
        pool.renew()
        draw = rng.random()
        if decoder_only:
            shape = (2, 17)
        elif share < 0.2 and draw < max(0.25, 0.8 - 4 * share):
            shape = (24, 1)
        elif share < 0.12:
            shape = (3, 9)
        else:
            shape = (2, 17)
        crop = (48, 64) if shape == (2, 17) and rng.random() < 0.75 else None  # same cost, twice the subjects
        x, subject = pool.batch(4, 17, crop) if crop else pool.batch(*shape)
        noise = torch.randn(x.shape[0], 16, (shape[1] - 1) // 4 + 1, x.shape[3] // 8, x.shape[4] // 8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (
                decoder_loss(params, x, 1 + 7 * subject, noise)
                if decoder_only
                else vae_loss(params, x, 1 + 6 * subject, noise)
            )
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
        if now - last_save > 180 or elapsed >= minutes * 60:
            figures = unseen_figures(ema, unseen)
            log(f"step {step} {elapsed / 60:.1f} min unseen {figures}")
            params = {k: v.detach() for k, v in params.items()}
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "figures": figures}
            save_state(path, {**state, "optimizers": [o.state_dict() for o in optimizers]})
            last_save = time.time()


@torch.no_grad()
def latent_statistics(params: dict[str, Tensor], num_clips: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and std `[z]` of the latents of clips of the world."""
    rng = np.random.default_rng(4000)
    rows = []
    for _ in range(num_clips):
        video, _ = world.render(world.sample_scene(rng), int(rng.integers(0, 2000)), 33, HEIGHT, WIDTH)
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(clipvae.encode_clip(params, x)[0])
    z = torch.cat(rows)
    return z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))


def load_vae(work: Path) -> dict[str, Tensor]:
    """The trained VAE's averaged parameters in training form, their latents like the published VAE's in mean and std;
    where none was trained in `work`, those of the shipped one."""
    decoder, whole = work / "vae_decoder.pt", work / "vae.pt"
    if decoder.exists():
        params = torch.load(decoder, weights_only=True)["ema"]
    elif whole.exists():
        params = torch.load(whole, weights_only=True)["ema"]
        params = clipvae.folded(params, *latent_statistics(params))
    else:
        shipped = load_file(WEIGHTS_DIR / VAE_FILE)
        params = clipvae.from_official({k: v.float() for k, v in shipped.items()})
    return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in params.items()}
