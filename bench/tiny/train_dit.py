"""The second step of the recipe: DiT and text encoder together, on clips that the VAE has encoded."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tiny import clipdit, clipvae, text
from bench.tiny.steps import HEIGHT, WIDTH, log, save_state
from bench.tiny.train_vae import load_vae
from miga_engine.tiny import world


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
            log(f"part {part}: {i + 1} clips in {time.time() - start:.0f} s")
    save_state(work / f"cache{part}.pt", {"latents": torch.stack(latents), "labels": torch.tensor(labels)})


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
        log(f"gradient of the compiled step against the plain one: cosine {same:.5f}")
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
            log(f"step {step} {elapsed / 60:.1f} min lr {lr:.2e} loss {running:.4f}")
        if now - last_save > 120 or elapsed >= minutes * 60:
            state = {"params": params, "ema": ema, "elapsed": elapsed, "step": step, "mean": mean, "std": std}
            save_state(path, {**state, "loss": running, "clips": len(latents), "optimizer": optimizer.state_dict()})
            last_save = time.time()
