"""The reader of the rich world: trained on rendered frames and on their reconstructions by the VAE."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tiny import clipvae
from bench.tiny.measures import played
from bench.tiny.steps import Setting, cosine, log, save_state, set_rate, to_video
from bench.tiny.train_vae import load_vae
from miga_engine.tiny import reader, world

_UNKNOWN = -100  # what a frame does not show counts for nothing


def labels_of(scene: world.Scene, frame: int, cover: Tensor) -> list[int]:
    """The classes of a frame, in the order of `reader.CLASSES`; of what is hidden there, none.

    `cover` `[H,W]` is the subject's. Its look shows where it covers 1.5 % of the picture, the sky where no bank is.
    """
    shown = float(cover.mean()) > 0.015
    open_sky = scene.behind != "clouds" or world.away([scene], [frame])[0] == 0
    found = []
    for name, values in reader.CLASSES.items():
        known = shown if name in reader.OF_THE_SUBJECT else open_sky or name not in ("sky", "side")
        found.append(values.index(getattr(scene, name)) if known else _UNKNOWN)
    return found


class PairPool:
    """Pairs of frames 8 apart with labels and covers, half of them as the VAE plays them; the oldest are renewed."""

    def __init__(self, setting: Setting, vae: dict[str, Tensor], size: int, seed: int, device: str) -> None:
        self.setting, self.vae, self.device = setting, vae, device
        self.rng = np.random.default_rng(seed)
        self.pairs = torch.zeros(size, 6, setting.height, setting.width, dtype=torch.float16, device=device)
        self.covers = torch.zeros(size, setting.height // 4, setting.width // 4, device=device)
        self.labels = torch.full((size, len(reader.CLASSES)), _UNKNOWN, device=device)
        self.filled = self.next_index = 0

    def _put(self, pair: Tensor, cover: Tensor, labels: list[int]) -> None:
        self.pairs[self.next_index] = pair.flatten(0, 1).half()
        self.covers[self.next_index] = F.avg_pool2d(cover[None, None].float(), 4)[0, 0]
        self.labels[self.next_index] = torch.tensor(labels)
        self.filled = max(self.filled, self.next_index + 1)
        self.next_index = (self.next_index + 1) % len(self.pairs)

    @torch.no_grad()
    def renew(self) -> None:
        """One scene: its true frames and what the VAE makes of them, of latents that are a little off."""
        scene, first = self.setting.sample_scene(self.rng), int(self.rng.integers(0, 3000))
        video, cover, _ = self.setting.render(scene, first, reader.LAG + 1, self.device)
        x = to_video(video[None])
        with torch.autocast(self.device, torch.bfloat16):
            z, _ = clipvae.encode_clip(self.vae, x)
            z = z + 0.2 * float(self.rng.random()) * z.std() * torch.randn_like(z)
            rec = clipvae.decode_clip(self.vae, z).clamp(-1, 1)
        for clip in (x, rec):
            a, b = (0, reader.LAG) if self.rng.random() < 0.5 else (reader.LAG, 0)
            self._put(clip[0, :, [a, b]].transpose(0, 1), cover[a], labels_of(scene, first + a, cover[a]))


def train_reader(work: Path, setting: Setting, minutes: float, lr: float = 2e-3, device: str = "cpu") -> None:
    """Trains the reader; `work/reader.pt` holds it and what it reads right of unseen scenes."""
    model = reader.SceneReader().to(device)
    vae = load_vae(work, setting, device)
    pool = PairPool(setting, vae, 4000, 31, device)
    for _ in range(200):
        pool.renew()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    begin, step = time.time(), 0
    while (share := (time.time() - begin) / (minutes * 60)) < 1:
        set_rate(optimizer, lr * cosine(share))
        pool.renew()
        picked = torch.randint(0, pool.filled, (32,), device=device)
        x = pool.pairs[picked].float()
        x = x + 0.06 * float(pool.rng.random()) * torch.randn_like(x)
        factors, cover = model(x)
        losses = [F.cross_entropy(factors[n], pool.labels[picked, i]) for i, n in enumerate(reader.CLASSES)]
        loss = torch.stack([v.nan_to_num() for v in losses]).sum()
        loss = loss + 5 * F.binary_cross_entropy_with_logits(cover, pool.covers[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            log(f"step {step} {share * minutes:.1f} min loss {loss.item():.3f}")
    figures = {kind: reader_figures(model.eval(), setting, vae if kind == "vae" else None) for kind in ("true", "vae")}
    log(f"unseen scenes read right: {figures}")
    save_state(work / "reader.pt", {"params": model.state_dict(), "figures": figures})


@torch.no_grad()
def reader_figures(
    model: reader.SceneReader, setting: Setting, vae: dict[str, Tensor] | None, num_scenes: int = 200
) -> dict[str, float]:
    """Share of clips of 17 frames of unseen scenes whose factors are read right, and the mean distance of the subject's
    centre from the truth in pixels of a picture 64 high; of clips as the VAE plays them where one is given."""
    rng = np.random.default_rng(4242)
    right: dict[str, list[bool]] = {name: [] for name in reader.CLASSES}
    off = []
    for _ in range(num_scenes):
        scene, first = setting.sample_scene(rng), int(rng.integers(5000, 9000))
        video, cover, _ = setting.render(scene, first, 17)
        if vae is not None:
            rec = clipvae.decode_clip(vae, clipvae.encode_clip(vae, to_video(video[None]))[0])
            seen = reader.read(model, played(rec[0].transpose(0, 1)))
        else:
            seen = reader.read(model, video.numpy())
        labels = np.array([labels_of(scene, first + t, cover[t]) for t in range(17)])
        for i, name in enumerate(reader.CLASSES):
            known = labels[:, i] != _UNKNOWN
            if known.all():
                right[name].append(seen.most(name) == getattr(scene, name))
        total = cover.double().sum((1, 2))
        y, x = ((torch.arange(n).double() + 0.5) for n in cover.shape[1:])
        true = torch.stack([(cover.sum(1) * x).sum(1), (cover.sum(2) * y).sum(1)], 1) / total[:, None]
        size = np.array([setting.width, setting.height])
        shown = (total > 0.015 * cover[0].numel()).numpy() & ~np.isnan(seen.centre[:, 0])
        off += list(np.linalg.norm(seen.centre * size - true.numpy(), axis=1)[shown] * 64 / setting.height)
    shares = {name: round(float(np.mean(v)), 4) for name, v in right.items()}
    return {**shares, "centre_off": round(float(np.mean(off)), 3)}
