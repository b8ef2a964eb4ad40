"""The last step of the recipe: the folder in the official Wan layout, with its card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.tiny import clipvae, text
from bench.tiny.steps import DIT_FILE, TEXT_FILE, VAE_FILE, Setting, log
from bench.tiny.train_dit import shipped_dit
from bench.tiny.train_vae import load_vae
from miga_engine.files import path_written_whole, write_whole
from miga_engine.tiny import WEIGHTS_DIR, world

_CARD = """# The embedded model `tiny`

A Wan2.1-shaped text-to-video model of a small world, made to try, test and measure `miga_engine` on any machine.
Licence: Apache-2.0. It was trained from nothing but the procedural scenes of `miga_engine/tiny/world.py`.

| part | shape | parameters |
|---|---|---|
| Wan VAE | base width 16, 1 residual block, z 16, 4×8×8 compression | {vae_size:.2f} M |
| UMT5 encoder | 2 layers, width 96, 4 heads, vocabulary {vocab} words | {text_size:.2f} M |
| Wan DiT | {layers} layers, width {dim}, {heads} heads of 64, feed-forward {ffn_dim}, {text_len} text rows | {dit_size:.2f} M |

## World
{num_captions} captions (4 subjects × 5 colours × 4 terrains × 4 times of day), such as "a red balloon over snowy hills at
dawn"; layout and motion from a seed; {height}×{width} pixels, 12 frames a second. Words the tokenizer does not know are <unk>.

## Recipe (`python -m bench.tiny.train`), on 2 CPU cores, bf16 autocast
1. VAE: {vae_minutes} minutes, {vae_steps} steps; 24 single frames or 3 clips of 9 frames at first, then 17-frame clips
   (2 whole, or 4 cut around the subject), L1 + 2·L2 + 0.5·gradient difference, subject weighted ×7, + 1e-4·KL, EMA 0.995. Every
   3×3×3 convolution acts on the current frame only; time is learned in the (3,1,1) convolutions of the resamplers.
   As run: AdamW, learning rate peak 1.5e-3, then after restarts 1e-3 and, from minute 23, 9e-4, always falling by a cosine.
   The latents' statistics are folded into conv1 and conv2, so the published Wan2.1 mean and std normalise them.
   Then, after 17 minutes of it by AdamW, {vae_decoder_minutes} minutes, {vae_decoder_steps} steps, of the decoder alone (`vae --decoder-only`), latents as they were:
   L1 with the subject weighted ×8, 0.5 × the error's differences in space, its difference in time, and its second
   difference in time where the subject is; Muon for the kernels, AdamW for the rest.
2. DiT and text encoder together, first 26 minutes, 3048 steps of AdamW, loss unweighted, 2000 clips; then from there
   {dit_minutes} minutes, {dit_steps} steps of 16 windows of 13 latent frames from {dit_clips} encoded clips of 97 frames; flow
   matching, one noise level a window, logit-normal with shift 3, 10 % of the captions empty, 30 % in other words. Errors
   count 4 times more at the subject and up to 4 times more where latents change in time (arXiv 2601.20504); a head, not
   exported, reads the true motion after half of the blocks (after arXiv 2502.02492). Muon for the blocks' matrices, AdamW
   for the rest, 1e-3, over the last quarter falling to nothing. Of the two running averages the {dit_average} one, which
   wobbles least.
   Last mean loss {dit_loss}, unweighted.
3. A small classifier of subject, colour, terrain and time, trained on rendered and on reconstructed frames.

## Figures (`python -m bench.tiny.measures`)
```json
{figures}
```
PSNR over unseen scenes, mean over scenes; the box bounds the subject. Of generated 49-frame clips (24 Euler steps, shift
3, guidance 3) the share is given whose attribute the classifier reads as asked for.

`jitter` is the mean length of the subject's acceleration in pixels a frame², `not_one_piece` the share of frames in which
its colour shows in the sky as several areas or none (`bench/tiny/pieces.py`), with a 95 % interval over the clips counted, all
but those of white subjects at night, whose colour is the moon's; true clips of the world have 0.16 and 0.

## Limits
The world is all it knows. The subject holds together and moves as it should; now and then there are two of it for a moment, as
it passes from one place to another, or it grows out of the sun. The sun itself changes its place, its size and its sharpness.
Beaks, windows and tails come and go, hills are soft as clouds and dark at night, and white subjects may merge with the sun. The classifier's shares say that the attributes can be read, not that the picture is
sharp. Frames 1 and 4 of a reconstruction, where the causal decoder starts up, are some 3 dB below the rest
(`psnr_db_first_frames`).
"""  # noqa: E501


def _trained(work: Path, name: str) -> dict[str, Any]:
    path = work / name
    found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu") if path.exists() else {}
    return found


def export(work: Path, setting: Setting, folder: Path, average: str, figures: dict[str, object]) -> None:
    """Writes the folder in the official Wan layout, in float16: of each part what `work` trained, else what ships.

    `average` names the running average of the DiT that is taken, see `train_dit.DECAYS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vae, decoder, dit = (_trained(work, name) for name in ("vae.pt", "vae_decoder.pt", "dit.pt"))

    def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().half().contiguous() for k, v in state.items()}

    trained = dit["averages"][average] if dit else shipped_dit()
    files = {
        DIT_FILE: half({k[4:]: v for k, v in trained.items() if k.startswith("dit.")}),
        TEXT_FILE: half({k[5:]: v for k, v in trained.items() if k.startswith("text.")}),
        VAE_FILE: half(clipvae.to_official(load_vae(work, setting))),
    }
    classifier = "classifier.safetensors"
    files[classifier] = half(_trained(work, "classifier.pt") or load_file(WEIGHTS_DIR / classifier))
    if (work / "reader.pt").exists():
        files["reader.safetensors"] = half(_trained(work, "reader.pt")["params"])
    for name, state in files.items():
        with path_written_whole(folder / name) as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)
    write_whole(folder / "config.json", json.dumps(setting.dit_config, indent=2) + "\n")
    text.save_tokenizer(folder, setting.rich)
    training = json.loads((WEIGHTS_DIR / "miga.json").read_text())["training"]
    for part, state in (("vae", vae), ("vae_decoder", decoder), ("dit", dit)):
        if state:
            training |= {f"{part}_minutes": round(state["elapsed"] / 60, 1), f"{part}_steps": state["step"]}
    if dit:
        training |= {"dit_clips": dit["clips"], "dit_loss": round(dit["loss"], 4), "dit_average": average}
    facts = {
        "name": "miga_engine tiny",
        "license": "Apache-2.0",
        "window_frames": 13,
        "fps": 12,
        "height": setting.height,
        "width": setting.width,
        "default_negative_prompt": "",
        "training": training,
        "figures": figures,
    }
    write_whole(folder / "miga.json", json.dumps(facts, indent=2) + "\n")
    million = {name: sum(v.numel() for v in state.values()) / 1e6 for name, state in files.items()}
    card = _CARD.format(
        **training,
        **dataclasses.asdict(setting),
        heads=setting.dim // 64,
        text_len=setting.text_len,
        vae_size=million[VAE_FILE],
        text_size=million[TEXT_FILE],
        dit_size=million[DIT_FILE],
        vocab=len(trained["text.token_embedding.weight"]),
        num_captions=len(world.all_captions()),
        figures=json.dumps(figures, indent=2),
    )
    write_whole(folder / "MODEL_CARD.md", card)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    log(f"{folder}: {size / 2**20:.1f} MiB")
