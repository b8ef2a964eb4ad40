"""The recipe of the embedded model: `python -m bench.tiny.train {vae,cache,dit,classifier,export}`.

Each step keeps a checkpoint in `--work` and goes on from it when started again. Lengths of training are wall-clock
minutes, because the recipe is made for a small CPU; the learning rate follows the share of the time used.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench.tiny import clipdit, clipvae
from miga_engine.files import path_written_whole, write_whole, written_whole
from miga_engine.models.wan.vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD
from miga_engine.tiny import WEIGHTS_DIR, measures, text, world

HEIGHT, WIDTH = 64, 96


def _log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def _save(path: Path, state: object) -> None:
    """Writes a checkpoint whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)


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
            _log(f"step {step} {elapsed / 60:.1f} min lr {lr:.2e} loss {running:.4f}")
        if now - last_save > (60 if decoder_only else 150) or elapsed >= minutes * 60:
            psnr = vae_psnr(ema, unseen)
            _log(f"step {step} {elapsed / 60:.1f} min unseen PSNR {psnr[0]:.2f} dB, subject box {psnr[1]:.2f} dB")
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "psnr": psnr}  # psnr: whole, box
            _save(path, {**state, "optimizer": optimizer.state_dict()})
            last_save = time.time()


def load_vae(work: Path) -> dict[str, Tensor]:
    """The trained VAE's averaged parameters, in training form."""
    path = work / "vae_decoder.pt"
    params: dict[str, Tensor] = torch.load(path if path.exists() else work / "vae.pt", weights_only=True)["ema"]
    return {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in params.items()}


@torch.no_grad()
def cache_latents(work: Path, num_clips: int, num_frames: int, part: int, parts: int) -> None:
    """Renders and encodes clips for the DiT: raw mean latents in float16 and the scenes they show, one file a part."""
    params = load_vae(work)
    clipvae.norm_silu = torch.compile(clipvae.norm_silu, dynamic=True)
    rng = np.random.default_rng(5000 + part)
    latents, labels = [], []
    start = time.time()
    for i in range(num_clips // parts):
        scene = world.sample_scene(rng)
        video, _ = world.render(scene, int(rng.integers(0, 2000)), num_frames, HEIGHT, WIDTH)
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = clipvae.encode_clip(params, x)
        latents.append(mean[0].half())
        labels.append(scene.labels)
        if i % 100 == 99:
            _log(f"part {part}: {i + 1} clips in {time.time() - start:.0f} s")
    _save(work / f"cache{part}.pt", {"latents": torch.stack(latents), "labels": torch.tensor(labels)})


def load_cache(work: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised latents `[N,C,F,h,w]` in float16, labels `[N,4]`, and the channels' mean and std."""
    parts = [torch.load(path, weights_only=True) for path in sorted(work.glob("cache*.pt"))]
    raw = torch.cat([p["latents"] for p in parts])
    sample = raw[:: max(1, len(raw) // 400)].float()
    mean, std = sample.mean((0, 2, 3, 4)), sample.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    normal = torch.cat([((r.float() - mean.view(shape)) / std.view(shape)).half() for r in raw.split(64)])
    return normal, torch.cat([p["labels"] for p in parts]), mean, std


def scene_of(labels: Tensor) -> world.Scene:
    """The scene with these four attribute indices."""
    s, c, te, ti = labels.tolist()
    return world.Scene(world.SUBJECTS[s], world.COLOURS[c], world.TERRAINS[te], world.TIMES[ti])


def dit_loss(
    dit: dict[str, Tensor],
    text: dict[str, Tensor],
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    ids: Tensor,
    mask: Tensor,
    rope: Tensor,
) -> Tensor:
    """Flow matching: mean square error of the velocity `noise - x0` at one noise level a clip."""
    s = sigma[:, None, None, None, None]
    rows = clipdit.encode_text(text, ids, mask)
    v = clipdit.velocity(dit, (1 - s) * x0 + s * noise, 1000 * sigma, rows, rope)
    return (v - (noise - x0)).square().mean()


def train_dit(work: Path, minutes: float, peak_lr: float, seed: int = 0, compile_step: bool = True) -> None:
    """Trains DiT and text encoder together on windows of 13 latent frames of the cached clips."""
    path = work / "dit.pt"
    latents, labels, mean, std = load_cache(work)
    scenes = [scene_of(row) for row in labels]
    tokenizer = text.build_tokenizer()
    length = int(clipdit.DIT_CONFIG["text_len"])  # type: ignore[call-overload]
    params = {f"dit.{k}": v for k, v in clipdit.init_dit(seed).items()}
    params |= {f"text.{k}": v for k, v in clipdit.init_text_encoder(tokenizer.get_vocab_size(), seed).items()}
    ema = {k: v.clone() for k, v in params.items()}
    elapsed, step = 0.0, 0
    saved = torch.load(path, weights_only=True) if path.exists() else None
    if saved is not None:
        params, ema, elapsed, step = saved["params"], saved["ema"], saved["elapsed"], saved["step"]
    params = {k: v.detach().requires_grad_() for k, v in params.items()}
    dit = {k[4:]: v for k, v in params.items() if k.startswith("dit.")}
    encoder = {k[5:]: v for k, v in params.items() if k.startswith("text.")}
    decayed = [v for v in params.values() if v.ndim >= 2]
    plain = [v for v in params.values() if v.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.99))
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    rng = np.random.default_rng(seed + 99 * step)
    torch.manual_seed(seed + step)
    f, batch = 13, 16
    rope = clipdit.rope_table(f, HEIGHT // 16, WIDTH // 16)

    def draw() -> tuple[Tensor, ...]:
        rows = rng.integers(0, len(latents), batch)
        late = latents.shape[2] - f
        # half of the windows open a video, whose first latent is a single frame; the others lie inside one
        starts = [0 if rng.random() < 0.5 else int(rng.integers(0, late + 1)) for _ in rows]
        x0 = torch.stack([latents[int(r), :, s : s + f] for r, s in zip(rows, starts, strict=True)]).float()
        prompts = []
        for r in rows:
            words = world.caption(scenes[r]) if rng.random() < 0.7 else text.wording(scenes[r], rng)
            prompts.append("" if rng.random() < 0.1 else words)
        ids, mask = text.tokenize(tokenizer, prompts, length)
        unknown = (torch.rand(ids.shape) < 0.01) & (ids > 2)
        u = torch.sigmoid(torch.randn(batch))
        sigma = 3 * u / (1 + 2 * u)
        return x0, torch.randn_like(x0), sigma, ids.masked_fill(unknown, 2), mask

    loss_fn: Callable[..., Tensor] = dit_loss
    if compile_step:
        inputs = draw()
        grads = []
        forms: list[Callable[..., Tensor]] = [dit_loss, torch.compile(dit_loss)]
        for fn in forms:
            with torch.autocast("cpu", torch.bfloat16):
                loss = fn(dit, encoder, *inputs, rope)
            grads.append(torch.autograd.grad(loss, list(params.values()), allow_unused=True))
            loss_fn = fn
        flat = [torch.cat([g.flatten() for g in gs if g is not None]) for gs in grads]
        same = float(F.cosine_similarity(flat[0], flat[1], dim=0))
        _log(f"gradient of the compiled step against the plain one: cosine {same:.5f}")
        if not same > 0.995:
            loss_fn = dit_loss
    last = last_save = time.time()
    running = None
    while elapsed < minutes * 60:
        share = elapsed / (minutes * 60)
        lr = peak_lr * min(1.0, (step + 1) / 150) * max(0.01, 0.5 * (1 + float(np.cos(np.pi * share))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch_inputs = draw()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(dit, encoder, *batch_inputs, rope)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([v for v in params.values() if v.grad is not None], 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.values()), [v.detach() for v in params.values()], 1 - decay)
        step += 1
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        now = time.time()
        elapsed += now - last
        last = now
        if step % 100 == 0:
            _log(f"step {step} {elapsed / 60:.1f} min lr {lr:.2e} loss {running:.4f}")
        if now - last_save > 120 or elapsed >= minutes * 60:
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "mean": mean, "std": std}
            _save(path, {**state, "loss": running, "clips": len(latents), "optimizer": optimizer.state_dict()})
            last_save = time.time()


def train_classifier(work: Path, minutes: float) -> None:
    """Trains the attribute classifier on rendered frames and on their reconstructions."""
    model = measures.AttributeClassifier()
    params = load_vae(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(31)
    frames: list[Tensor] = []
    labels: list[tuple[int, int, int, int]] = []
    start = time.time()
    _log("rendering")
    for i in range(1500):
        scene = world.sample_scene(rng)
        short = 5 if i % 3 == 0 else 1
        video, _ = world.render(scene, int(rng.integers(0, 2000)), short, HEIGHT, WIDTH)
        if rng.random() < 0.5:
            video = video[:, :, ::-1].copy()
        x = measures.to_tensor(video)
        if short > 1:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                mean, _ = clipvae.encode_clip(params, x.transpose(0, 1)[None])
                mean = mean + 0.15 * mean.std() * torch.randn_like(mean) * float(rng.random())
                rec = clipvae.decode_clip(params, mean).clamp(-1, 1)[0].transpose(0, 1)
            x = torch.cat([x[:1], rec[[0, 4]]])
        frames.append(x)
        labels += [scene.labels] * len(x)
    data, target = torch.cat(frames), torch.tensor(labels)
    _log(f"{len(data)} frames after {time.time() - start:.0f} s")
    step = 0
    begin = time.time()
    while (share := (time.time() - begin) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.01, 0.5 * (1 + float(np.cos(np.pi * share))))
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
            _log(f"step {step} losses {[round(v.item(), 3) for v in losses]}")
    _save(work / "classifier.pt", model.state_dict())
    model.eval()
    unseen = np.random.default_rng(4242)
    right = []
    for _ in range(100):
        scene = world.sample_scene(unseen)
        video, _ = world.render(scene, 5000, 1, HEIGHT, WIDTH)
        right.append(list(measures.frame_accuracy(model, measures.to_tensor(video), scene).values()))
    _log(f"rendered frames read right (subject, colour, terrain, time): {np.mean(right, 0).tolist()}")


def folded_vae(work: Path, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Official parameters whose latents, under the published Wan2.1 statistics, have mean 0 and std 1 on the world.

    The change of scale goes into the 1x1x1 convolutions `conv1` (after the encoder) and `conv2` (before the decoder).
    """
    state = {k: v.float() for k, v in clipvae.to_official(load_vae(work)).items()}
    wan_mean, wan_std = torch.tensor(WAN_LATENTS_MEAN), torch.tensor(WAN_LATENTS_STD)
    scale = wan_std / std
    z = len(mean)
    state["conv1.weight"][:z] *= scale[:, None, None, None, None]
    state["conv1.bias"][:z] = (state["conv1.bias"][:z] - mean) * scale + wan_mean
    state["conv1.bias"][z:] += 2 * scale.log()
    weight = state["conv2.weight"][..., 0, 0, 0]
    state["conv2.bias"] = state["conv2.bias"] + weight @ (mean - wan_mean / scale)
    state["conv2.weight"] = (weight / scale)[..., None, None, None]
    return state


_CARD = """# The embedded model `tiny`

A Wan2.1-shaped text-to-video model of a small world, made to try, test and measure `miga_engine` on any machine.
Licence: Apache-2.0. It was trained from nothing but the procedural scenes of `miga_engine/tiny/world.py`.

| part | shape | parameters |
|---|---|---|
| Wan VAE | base width 16, 1 residual block, z 16, 4×8×8 compression | {vae_size:.2f} M |
| UMT5 encoder | 2 layers, width 96, 4 heads, vocabulary {vocab} words | {text_size:.2f} M |
| Wan DiT | 6 layers, width 192, 3 heads of 64, feed-forward 768, 24 text rows | {dit_size:.2f} M |

## World
{num_captions} captions (4 subjects × 5 colours × 4 terrains × 4 times of day), such as "a red balloon over snowy hills at
dawn"; layout and motion from a seed; 64×96 pixels, 12 frames a second. Words the tokenizer does not know are <unk>.

## Recipe (`python -m bench.tiny.train`), on 2 CPU cores, bf16 autocast
1. VAE: {vae_minutes} minutes, {vae_steps} steps; 24 single frames or 3 clips of 9 frames at first, then 17-frame clips
   (2 whole, or 4 cut around the subject), L1 + 2·L2 + 0.5·gradient difference, subject weighted ×7, + 1e-4·KL, EMA 0.995. Every
   3×3×3 convolution acts on the current frame only; time is learned in the (3,1,1) convolutions of the resamplers.
   As run: learning rate peak 1.5e-3, then after restarts 1e-3 and, from minute 23, 9e-4, always falling by a cosine.
   Then {vae_decoder_minutes} minutes, {vae_decoder_steps} steps, of the decoder alone.
   The latents' statistics are folded into conv1 and conv2, so the published Wan2.1 mean and std normalise them.
2. DiT and text encoder together: {dit_minutes} minutes, {dit_steps} steps of 16 windows of 13 latent frames from {dit_clips}
   encoded clips; flow matching, one noise level a window, logit-normal with shift 3, 10 % of the captions empty, 30 % in
   other words, AdamW 1e-3 falling by a cosine, EMA 0.998. Last mean loss {dit_loss}.
3. A small classifier of subject, colour, terrain and time, trained on rendered and on reconstructed frames.

## Figures (`python -m miga_engine.tiny.measures`)
```json
{figures}
```
PSNR over unseen scenes, mean over scenes; the box bounds the subject. Of generated 49-frame clips (24 Euler steps, shift
3, guidance 3) the share is given whose attribute the classifier reads as asked for.

## Limits
The world is all it knows. Trained for minutes on two cores, it draws soft hills and blob-like subjects whose outline wobbles;
beak, window and tail are mostly lost, a bird at night is the weakest subject, white subjects may merge with the sun. The
classifier's shares say that the attributes can be read, not that the picture is sharp. Frames 1 and 4 of a reconstruction,
where the causal decoder starts up, are some 3 dB below the rest (`psnr_db_first_frames`).
"""  # noqa: E501


def export(work: Path, folder: Path, figures: dict[str, object]) -> None:
    """Writes the folder in the official Wan layout, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = torch.load(work / "dit.pt", weights_only=True)
    vae = torch.load(work / "vae.pt", weights_only=True)
    path = work / "vae_decoder.pt"
    decoder = torch.load(path, weights_only=True) if path.exists() else {}

    def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().half().contiguous() for k, v in state.items()}

    ema: dict[str, Tensor] = saved["ema"]
    dit = half({k[4:]: v for k, v in ema.items() if k.startswith("dit.")})
    encoder = half({k[5:]: v for k, v in ema.items() if k.startswith("text.")})
    files = {
        "diffusion_pytorch_model.safetensors": dit,
        "models_t5_umt5-xxl-enc-bf16.safetensors": encoder,
        "Wan2.1_VAE.safetensors": half(folded_vae(work, saved["mean"], saved["std"])),
    }
    if (work / "classifier.pt").exists():
        files["classifier.safetensors"] = half(torch.load(work / "classifier.pt", weights_only=True))
    for name, state in files.items():
        with path_written_whole(folder / name) as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)
    write_whole(folder / "config.json", json.dumps(clipdit.DIT_CONFIG, indent=2) + "\n")
    text.save_tokenizer(folder)
    training = {
        "vae_minutes": round(vae["elapsed"] / 60, 1),
        "vae_steps": vae["step"],
        "vae_decoder_minutes": round(decoder.get("elapsed", 0.0) / 60, 1),
        "vae_decoder_steps": decoder.get("step", 0),
        "dit_minutes": round(saved["elapsed"] / 60, 1),
        "dit_steps": saved["step"],
        "dit_clips": saved["clips"],
        "dit_loss": round(saved["loss"], 4),
    }
    facts = {
        "name": "miga_engine tiny",
        "license": "Apache-2.0",
        "window_frames": 13,
        "fps": 12,
        "height": HEIGHT,
        "width": WIDTH,
        "default_negative_prompt": "",
        "training": training,
        "figures": figures,
    }
    write_whole(folder / "miga.json", json.dumps(facts, indent=2) + "\n")
    million = {name: sum(v.numel() for v in state.values()) / 1e6 for name, state in files.items()}
    card = _CARD.format(
        **training,
        vae_size=million["Wan2.1_VAE.safetensors"],
        text_size=million["models_t5_umt5-xxl-enc-bf16.safetensors"],
        dit_size=million["diffusion_pytorch_model.safetensors"],
        vocab=len(ema["text.token_embedding.weight"]),
        num_captions=len(world.all_captions()),
        figures=json.dumps(figures, indent=2),
    )
    write_whole(folder / "MODEL_CARD.md", card)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    _log(f"{folder}: {size / 2**20:.1f} MiB")


def main() -> None:
    """Runs one step of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["vae", "cache", "dit", "classifier", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder of the checkpoints")
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock length of a training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="compile what is known to train the same compiled")
    parser.add_argument("--decoder-only", action="store_true", help="vae: train on with the encoder as it is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=2000, help="cache: number of clips over all parts")
    parser.add_argument("--frames", type=int, default=61, help="cache: video frames a clip")
    parser.add_argument("--part", type=int, default=0, help="cache: which part this process makes")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WEIGHTS_DIR, help="export: where the weights go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step == "vae":
        train_vae(args.work, args.minutes, args.lr, compile_step=args.compile, decoder_only=args.decoder_only)
    elif args.step == "cache":
        cache_latents(args.work, args.clips, args.frames, args.part, args.parts)
    elif args.step == "dit":
        train_dit(args.work, args.minutes, args.lr, compile_step=args.compile)
    elif args.step == "classifier":
        train_classifier(args.work, args.minutes)
    else:
        path = args.work / "figures.json"
        export(args.work, args.folder, json.loads(path.read_text()) if path.exists() else {})


if __name__ == "__main__":
    main()
