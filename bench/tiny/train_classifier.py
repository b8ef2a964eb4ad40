"""The third step of the recipe: the classifier of attributes, on rendered frames and on their reconstructions."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tiny import clipvae
from bench.tiny.steps import Setting, cosine, log, save_state, set_rate
from bench.tiny.train_vae import load_vae
from miga_engine.tiny import world
from miga_engine.tiny.classifier import AttributeClassifier, frame_accuracy, to_tensor


def train_classifier(work: Path, setting: Setting, minutes: float) -> None:
    """Trains the attribute classifier on rendered frames and on their reconstructions."""
    model = AttributeClassifier()
    params = load_vae(work, setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(31)
    frames: list[Tensor] = []
    labels: list[tuple[int, int, int, int]] = []
    start = time.time()
    log("rendering")
    for i in range(1500):
        scene = world.sample_scene(rng)
        short = 5 if i % 3 == 0 else 1
        video, _ = world.render(scene, int(rng.integers(0, 2000)), short, setting.height, setting.width)
        if rng.random() < 0.5:
            video = video[:, :, ::-1].copy()
        x = to_tensor(video)
        if short > 1:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                mean, _ = clipvae.encode_clip(params, x.transpose(0, 1)[None])
                mean = mean + 0.15 * mean.std() * torch.randn_like(mean) * float(rng.random())
                rec = clipvae.decode_clip(params, mean).clamp(-1, 1)[0].transpose(0, 1)
            x = torch.cat([x[:1], rec[[0, 4]]])
        frames.append(x)
        labels += [scene.labels] * len(x)
    data, target = torch.cat(frames), torch.tensor(labels)
    log(f"{len(data)} frames after {time.time() - start:.0f} s")
    step = 0
    begin = time.time()
    while (share := (time.time() - begin) / (minutes * 60)) < 1:
        set_rate(optimizer, 2e-3 * cosine(share))
        pick = torch.randint(0, len(data), (48,))
        x = data[pick]
        x = torch.roll(x, int(rng.integers(-10, 11)), 3) + 0.05 * float(rng.random()) * torch.randn_like(x)
        if rng.random() < 0.3:
            x = F.avg_pool2d(x, 3, 1, 1)
        losses = [F.cross_entropy(o, target[pick, i]) for i, o in enumerate(model(x))]
        total = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            log(f"step {step} losses {[round(v.item(), 3) for v in losses]}")
    save_state(work / "classifier.pt", model.state_dict())
    model.eval()
    unseen = np.random.default_rng(4242)
    right = []
    for _ in range(100):
        scene = world.sample_scene(unseen)
        video, _ = world.render(scene, 5000, 1, setting.height, setting.width)
        right.append(list(frame_accuracy(model, to_tensor(video), scene).values()))
    log(f"rendered frames read right (subject, colour, terrain, time): {np.mean(right, 0).tolist()}")
