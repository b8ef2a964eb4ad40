"""The last step of the recipe: the folder in the official Wan layout, with its card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.tiny import clipdit, clipvae, text
from bench.tiny.steps import HEIGHT, WIDTH, log
from bench.tiny.train_vae import load_vae
from miga_engine.files import path_written_whole, write_whole
from miga_engine.models.wan.vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD
from miga_engine.tiny import world


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

## Figures (`python -m bench.tiny.measures`)
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
    log(f"{folder}: {size / 2**20:.1f} MiB")
