"""The first step of the recipe: the VAE, on rendered clips."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tiny import clipvae
from bench.tiny.steps import HEIGHT, WIDTH, log, save_state
from miga_engine.tiny import world


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
        """`[B,3,T,H,W]` video in [-1, 1] and `[B,1,T,H,W]` loss weights, mirrored at random.

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
        m = F.max_pool2d(m, 5, 1, 2)
        return x, (1.0 + 6.0 * m)[:, None]


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
def vae_psnr(params: dict[str, Tensor], scenes: list[world.Scene], num_frames: int = 97) -> tuple[float, float]:
    """Mean PSNR in dB over whole scenes, and inside the subject's box, of the clip form."""
    whole, box = [], []
    for scene in scenes:
        video, mask = world.render(scene, 1000, num_frames, HEIGHT, WIDTH)
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            rec = clipvae.decode_clip(params, clipvae.encode_clip(params, x)[0])
        error = ((rec.clamp(-1, 1) - x) / 2).square().mean(1)[0].numpy()  # [T,H,W]
        whole.append(float(-10 * np.log10(error.mean())))
        inside = []
        for e, m in zip(error, mask, strict=True):
            rows, columns = np.flatnonzero(m.max(1) > 0.1), np.flatnonzero(m.max(0) > 0.1)
            inside.append(e[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean())
        box.append(float(-10 * np.log10(np.mean(inside))))
    return float(np.mean(whole)), float(np.mean(box))


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
    for k, v in params.items():
        v = v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
        params[k] = v.detach().clone(memory_format=torch.preserve_format)
        params[k].requires_grad_(not (decoder_only and k.startswith(("encoder.", "conv1."))))
    optimizer = torch.optim.AdamW(
        [v for v in params.values() if v.requires_grad], lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.0
    )
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
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
        for group in optimizer.param_groups:
            group["lr"] = lr
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
        x, weight = pool.batch(4, 17, crop) if crop else pool.batch(*shape)
        noise = torch.randn(x.shape[0], 16, (shape[1] - 1) // 4 + 1, x.shape[3] // 8, x.shape[4] // 8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = vae_loss(params, x, weight, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_([v for v in params.values() if v.grad is not None], 0.5))
        usual = norm if usual is None else usual
        if norm < 4 * usual:  # an outlier would throw the network off for minutes
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
        if now - last_save > (60 if decoder_only else 150) or elapsed >= minutes * 60:
            psnr = vae_psnr(ema, unseen)
            log(f"step {step} {elapsed / 60:.1f} min unseen PSNR {psnr[0]:.2f} dB, subject box {psnr[1]:.2f} dB")
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "psnr": psnr}  # psnr: whole, box
            save_state(path, {**state, "optimizer": optimizer.state_dict()})
            last_save = time.time()


def load_vae(work: Path) -> dict[str, Tensor]:
    """The trained VAE's averaged parameters, in training form."""
    path = work / "vae_decoder.pt"
    params: dict[str, Tensor] = torch.load(path if path.exists() else work / "vae.pt", weights_only=True)["ema"]
    return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in params.items()}
