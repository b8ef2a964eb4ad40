"""The second step of the recipe: DiT and text encoder together, on clips that the VAE has encoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bench.tiny import clipdit, clipvae, text
from bench.tiny.steps import DIT_FILE, TEXT_FILE, Setting, log, save_state, set_rate, stable_then_falling, to_video
from bench.tiny.train_vae import load_vae
from miga_engine.errors import ConfigError
from miga_engine.models.wan.vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD
from miga_engine.tiny import WEIGHTS_DIR, world

WINDOW = 13
DECAYS = {"short": 0.998, "long": 0.9995}


@dataclass(frozen=True)
class DitOptions:
    """How the DiT is trained: what `--minutes` and the other flags of the step set."""

    minutes: float
    lr: float = 1e-3
    batch: int = 16
    optimizer: str = "muon"
    muon_times: float = 1.0
    subject_weight: float = 4.0
    change_weight: float = 1.0
    motion_weight: float = 0.1
    fresh: bool = False
    compile: bool = True
    seed: int = 0


@torch.no_grad()
def cache_latents(
    work: Path,
    setting: Setting,
    num_clips: int,
    num_frames: int,
    per_part: int,
    part: int,
    parts: int,
    device: str = "cpu",
) -> None:
    """Renders and encodes clips for the DiT, a file for every `per_part`; what is there stays and is gone on from.

    A file holds the normalised latents `[N,C,F,h,w]` in float16, what moves in them `[N,3,F,h,w]` (flow right and down
    in pixels a frame, the subject's share of the cell) in float16, and what the scenes are, to be read by `scenes_of`.
    """
    params = load_vae(work, setting, device)
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (WAN_LATENTS_MEAN, WAN_LATENTS_STD))
    if device == "cpu":
        clipvae.norm_silu = torch.compile(clipvae.norm_silu, dynamic=True)
    start = time.time()
    for number in range(part, num_clips // per_part, parts):
        path = work / f"cache{number:03d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng([5000, number])
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(per_part):
            scene = setting.sample_scene(rng)
            picture, cover, flow = setting.render(scene, int(rng.integers(0, 2000)), num_frames, device)
            x = to_video(picture[None])
            with torch.autocast(device, torch.bfloat16):
                latents, _ = clipvae.encode_clip(params, x)
            motion = torch.cat([flow.permute(3, 0, 1, 2), cover[None]])  # [3,T,H,W]
            cells = F.avg_pool2d(motion, 8)
            groups = [cells[:, :1], cells[:, 1:].unflatten(1, (-1, 4)).mean(2)]  # frames of each latent frame
            rows.append((((latents - mean) / std)[0].half(), torch.cat(groups, 1).half(), _labels(scene)))
        names = ("latents", "motion", "labels")
        save_state(path, {n: torch.stack(v).cpu() for n, v in zip(names, zip(*rows, strict=True), strict=True)})
        log(f"{path.name} after {time.time() - start:.0f} s")


def load_cache(work: Path, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Latents, motion and labels of all cached clips, see `cache_latents`."""
    parts = [torch.load(path, weights_only=True) for path in sorted(work.glob("cache*.pt"))]
    if not parts:
        raise ConfigError(f"{work} holds no cache*.pt: run the step cache first")
    latents, motion, labels = (torch.cat([p[name] for p in parts]) for name in ("latents", "motion", "labels"))
    return latents.to(device), motion.to(device), labels


def _labels(scene: world.Scene) -> Tensor:
    return torch.tensor([values.index(getattr(scene, name)) for name, values in world.FACTORS.items()])


def scenes_of(labels: Tensor) -> list[world.Scene]:
    """The scenes `[N]`, without their layouts, of labels `[N,fields]`, or of the first four fields alone."""
    factors = world.FACTORS.items()
    named = [{n: values[i] for (n, values), i in zip(factors, row, strict=False)} for row in labels.tolist()]
    return [world.Scene(**fields) for fields in named]


def dit_loss(
    dit: dict[str, Tensor],
    text_encoder: dict[str, Tensor],
    head: dict[str, Tensor],
    x0: Tensor,
    motion: Tensor,
    noise: Tensor,
    sigma: Tensor,
    ids: Tensor,
    mask: Tensor,
    rope: Tensor,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Flow matching at one noise level a clip: what is minimised, and the plain mean square error beside it.

    The error counts more where the subject is and where latents change in time (arXiv 2601.20504); the motion head's
    own error is added (arXiv 2502.02492). `weights` are those of subject, change and motion head.
    """
    s = sigma[:, None, None, None, None]
    rows = clipdit.encode_text(text_encoder, ids, mask)
    v, seen = clipdit.velocity_and_motion(dit, head, (1 - s) * x0 + s * noise, 1000 * sigma, rows, rope)
    error = (v - (noise - x0)).square().mean(1)  # [B,F,h,w]
    change = F.pad((x0[:, :, 1:] - x0[:, :, :-1]).abs().mean(1), (0, 0, 0, 0, 1, 0))
    weight = 1 + weights[0] * (2 * motion[:, 2]).clamp(max=1) + weights[1] * (change / change.mean()).clamp(max=4)
    loss = (weight * error).mean() / weight.mean()
    read = ((seen - motion * motion.new_tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1, 1)).square()).mean()
    return loss + weights[2] * read, error.detach().mean()


def shipped_dit() -> dict[str, Tensor]:
    """The shipped DiT and text encoder, under `dit.` and `text.`, in float32."""
    files = {"dit": DIT_FILE, "text": TEXT_FILE}
    return {f"{n}.{k}": v.float() for n, f in files.items() for k, v in load_file(WEIGHTS_DIR / f).items()}


def _begun(setting: Setting, options: DitOptions) -> dict[str, Tensor]:
    """What a training begins with: fresh parameters, or the shipped ones, whose words go to their places in the
    setting's tokenizer; words they lack are drawn anew."""
    vocab = text.build_tokenizer(setting.rich).get_vocab()
    encoder = clipdit.init_text_encoder(len(vocab), options.seed)
    if options.fresh:
        fresh = clipdit.init_dit(options.seed, setting.dim, setting.ffn_dim, setting.layers)
        return {f"dit.{k}": v for k, v in fresh.items()} | {f"text.{k}": v for k, v in encoder.items()}
    params = shipped_dit()
    shape = clipdit.init_dit(0, setting.dim, setting.ffn_dim, setting.layers)
    if {k[4:]: v.shape for k, v in params.items() if k.startswith("dit.")} != {k: v.shape for k, v in shape.items()}:
        raise ConfigError(
            f"the shipped DiT has another shape than dim {setting.dim}, ffn_dim {setting.ffn_dim} and layers "
            f"{setting.layers} say: give --fresh"
        )
    name = "text.token_embedding.weight"
    shipped, rows = text.load_tokenizer(WEIGHTS_DIR).get_vocab(), encoder["token_embedding.weight"]
    for word in vocab.keys() & shipped.keys():
        rows[vocab[word]] = params[name][shipped[word]]
    return params | {name: rows}


def _optimizers(params: dict[str, Tensor], options: DitOptions) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of the DiT's blocks if asked for, AdamW for the rest."""
    hidden = [
        v
        for k, v in params.items()
        if options.optimizer == "muon" and k.startswith("dit.blocks.") and v.ndim == 2 and "modulation" not in k
    ]
    ids = {id(v) for v in hidden}
    rest = [v for v in params.values() if id(v) not in ids]
    groups = [
        {"params": [v for v in rest if v.ndim >= 2], "weight_decay": 0.01},
        {"params": [v for v in rest if v.ndim < 2], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99))]
    if hidden:
        found.append(torch.optim.Muon(hidden, lr=options.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return found


def _batches(
    setting: Setting, latents: Tensor, motion: Tensor, labels: Tensor, options: DitOptions, first_step: int
) -> Iterator[tuple[Tensor, ...]]:
    """Batches from step `first_step` on; every step draws from its own seed, so that a run goes on as it would have."""
    tokenizer = text.build_tokenizer(setting.rich)
    scenes = scenes_of(labels)
    step = first_step
    while True:
        rng = np.random.default_rng([options.seed, step])
        seed = int(rng.integers(2**62))
        g = torch.Generator().manual_seed(seed)
        picked = rng.integers(0, len(latents), options.batch)
        late = latents.shape[2] - WINDOW
        # half of the windows open a video, whose first latent is a single frame; the others lie inside one
        starts = [0 if rng.random() < 0.5 else int(rng.integers(1, late + 1)) for _ in picked]
        x0, moves = (
            torch.stack([a[int(r), :, s : s + WINDOW] for r, s in zip(picked, starts, strict=True)]).float()
            for a in (latents, motion)
        )
        prompts = []
        for r in picked:
            if setting.rich:
                words = text.rich_wording(scenes[r], rng)
            else:
                words = world.caption(scenes[r]) if rng.random() < 0.7 else text.wording(scenes[r], rng)
            prompts.append("" if rng.random() < 0.1 else words)
        ids, mask = text.tokenize(tokenizer, prompts, setting.text_len)
        ids = ids.masked_fill((torch.rand(ids.shape, generator=g) < 0.01) & (ids > 2), 2)  # unknown words
        u = torch.sigmoid(torch.randn(options.batch, generator=g))
        drawn_there = g if x0.device.type == "cpu" else torch.Generator(x0.device).manual_seed(seed)
        noise = torch.randn(x0.shape, generator=drawn_there, device=x0.device)
        yield x0, moves, noise, *(v.to(x0.device) for v in (3 * u / (1 + 2 * u), ids, mask))
        step += 1


def train_dit(work: Path, setting: Setting, options: DitOptions, device: str = "cpu") -> None:
    """Trains DiT and text encoder together on windows of 13 latent frames of the cached clips.

    `work/dit.pt` holds all that a run goes on from: parameters, both averages, optimisers, step and time used.
    """
    path = work / "dit.pt"
    latents, motion, labels = load_cache(work, device)
    saved = torch.load(path, weights_only=True, map_location=device) if path.exists() else None
    params = _begun(setting, options) if saved is None else saved["params"]
    if saved is None:
        dim = params["dit.head.head.weight"].shape[1]
        params |= {f"head.{k}": v for k, v in clipdit.init_motion_head(dim).items()}
    params = {k: v.detach().to(device).requires_grad_() for k, v in params.items()}
    averages = saved["averages"] if saved else {n: {k: v.detach().clone() for k, v in params.items()} for n in DECAYS}
    elapsed, step = (saved["elapsed"], saved["step"]) if saved else (0.0, 0)
    parts = [{k.split(".", 1)[1]: v for k, v in params.items() if k.startswith(p)} for p in ("dit.", "text.", "head.")]
    optimizers = _optimizers(params, options)
    if saved is not None:
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    rope = clipdit.rope_table(WINDOW, setting.height // 16, setting.width // 16).to(device)
    weights = (options.subject_weight, options.change_weight, options.motion_weight)
    loss_fn: Callable[..., tuple[Tensor, Tensor]] = torch.compile(dit_loss) if options.compile else dit_loss
    last = last_save = time.time()
    running = torch.zeros(2, device=device)
    first_step = step
    for batch in _batches(setting, latents, motion, labels, options, step):
        share = elapsed / (options.minutes * 60)
        factor = stable_then_falling(share) * min(1.0, (step + 1) / 150)
        for optimizer in optimizers:
            times = options.muon_times if isinstance(optimizer, torch.optim.Muon) else 1.0
            set_rate(optimizer, options.lr * times * factor)
        with torch.autocast(device, torch.bfloat16):
            loss, plain = loss_fn(*parts, *batch, rope, weights)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([v for v in params.values() if v.grad is not None], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, decay in DECAYS.items():
                decay = min(decay, (1 + step) / (3 + step))
                torch._foreach_lerp_(list(averages[name].values()), [v.detach() for v in params.values()], 1 - decay)
        step += 1
        keep = min(0.99, (step - first_step) / (step - first_step + 1))
        running.lerp_(torch.stack([loss.detach(), plain]).float(), 1 - keep)  # on the device: nothing waits for it
        now = time.time()
        elapsed += now - last
        last = now
        done = elapsed >= options.minutes * 60
        if step % 100 == 0:
            log(f"step {step} {elapsed / 60:.1f} min lr x{factor:.2f} loss {running[0]:.4f} plain {running[1]:.4f}")
        if now - last_save > 180 or done:
            state = {"params": params, "averages": averages, "elapsed": elapsed, "step": step, "clips": len(latents)}
            save_state(path, {**state, "loss": float(running[1]), "optimizers": [o.state_dict() for o in optimizers]})
            last_save = time.time()
        if done:
            break
