"""LoRA files in each spelling, written in small, merged, and compared with W + strength · s · B @ A."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import random_wan
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from written_formats import Case, diffusers_name, plain, refused, saved

from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WanDiT

RANK, STRENGTH = 4, 0.75
MERGED = "merged: equal to W + strength · s · B·A"
A_B, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
Names = Callable[[str], str]


@functools.cache
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for every linear map of the transformer."""
    generator = torch.Generator().manual_seed(5)
    return {
        key.removesuffix(".weight"): (
            torch.randn(RANK, value.shape[1], generator=generator) / 8,
            torch.randn(value.shape[0], RANK, generator=generator) / 8,
        )
        for key, value in plain("transformer").items()
        if value.ndim == 2 and key.endswith(".weight")
    }


def check_merged(base: Path, lora: Path, expected: Mapping[str, Tensor], strength: float = STRENGTH) -> None:
    """Raise AssertionError where the merged network is another, or the same as without the file."""
    state = load_transformer(base, dtype=torch.float32, loras=[(lora, strength)]).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=2e-5, atol=2e-6)
    assert any(not torch.equal(state[key], value) for key, value in plain("transformer").items())


def base(folder: Path) -> Path:
    return saved(folder / "wan.safetensors", plain("transformer"))


def pairs(names: Names, ends: tuple[str, str], alpha: float | None = None, **header: str) -> Callable[[Path], str]:
    """With an alpha beside each pair, or one that the header says."""

    def tries(folder: Path) -> str:
        tensors, expected = {}, dict(plain("transformer"))
        said = json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] if header else alpha
        for module, (down, up) in factors().items():
            tensors |= {names(module) + ends[0]: down, names(module) + ends[1]: up}
            if alpha is not None:
                tensors[f"{names(module)}.alpha"] = torch.tensor(alpha)
            scale = 1.0 if said is None else said / RANK
            expected[f"{module}.weight"] = expected[f"{module}.weight"] + STRENGTH * scale * (up @ down)
        save_file(tensors, folder / "lora.safetensors", header or None)
        check_merged(base(folder), folder / "lora.safetensors", expected)
        return MERGED

    return tries


def dotted(prefix: str) -> Names:
    return lambda module: prefix + module


def underscored(prefix: str) -> Names:
    return lambda module: prefix + module.replace(".", "_")


def theirs(module: str) -> str:
    return "transformer." + diffusers_name(module + ".").removesuffix(".")


def pusa(folder: Path) -> str:
    """A pickle, bare names."""
    tensors, expected = {}, dict(plain("transformer"))
    for module, (down, up) in factors().items():
        tensors |= {module + NAMED[0]: down, module + NAMED[1]: up}
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + STRENGTH * (up @ down)
    torch.save(tensors, folder / "pusa_v1.pt")
    check_merged(base(folder), folder / "pusa_v1.pt", expected)
    return MERGED


def differences(parts: Mapping[str, str]) -> Callable[[Path], str]:
    """By key of the model, what the file calls its difference."""

    def tries(folder: Path) -> str:
        tensors, expected = {}, dict(plain("transformer"))
        for key, name in parts.items():
            tensors[name] = torch.linspace(-1, 1, expected[key].numel()).view_as(expected[key])
            expected[key] = expected[key] + STRENGTH * tensors[name]
        check_merged(base(folder), saved(folder / "lora.safetensors", tensors), expected)
        return "merged: equal to W + strength · difference"

    return tries


def dora(folder: Path) -> str:
    tensors, expected = {}, dict(plain("transformer"))
    for module, (down, up) in factors().items():
        weight = expected[f"{module}.weight"]
        magnitude = weight.norm(dim=1, keepdim=True) * 1.25
        tensors |= {f"diffusion_model.{module}{end}": part for end, part in zip(A_B, (down, up), strict=True)}
        tensors[f"diffusion_model.{module}.dora_scale"] = magnitude
        changed = weight + up @ down
        changed = changed * magnitude / changed.norm(dim=1, keepdim=True)
        expected[f"{module}.weight"] = weight + STRENGTH * (changed - weight)
    check_merged(base(folder), saved(folder / "lora.safetensors", tensors), expected)
    return "merged: equal to W + strength · (m·V/‖V‖ - W) with V = W + s · B·A"


def randomised(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 8)


def of_peft(**options: Any) -> Callable[[Path], str]:
    """Written, and merged for comparison, by peft itself."""

    def tries(folder: Path) -> str:
        import peft

        network = WanDiT(random_wan.CONFIG)
        network.load_state_dict(plain("transformer"))
        targets = ["q", "k", "v", "o", "ffn.0", "ffn.2", "time_projection.1", "head.head"]
        config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, **options)
        model = peft.get_peft_model(network, config)
        randomised(model)
        model.save_pretrained(folder)
        expected = model.merge_and_unload().state_dict()
        check_merged(base(folder), folder / "adapter_model.safetensors", expected, 1.0)
        return "merged: equal to what peft merges"

    return tries


def of_diffusers(folder: Path) -> str:
    """Written, and fused for comparison, by diffusers itself."""
    import peft
    from diffusers import WanPipeline, WanTransformer3DModel
    from diffusers.training_utils import _collate_lora_metadata
    from written_formats import diffusers_transformer

    transformer: WanTransformer3DModel = diffusers_transformer()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out", "time_proj"]
    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets))
    randomised(transformer)
    layers, said = peft.get_peft_model_state_dict(transformer), _collate_lora_metadata({"transformer": transformer})
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, **said)
    transformer.fuse_lora(lora_scale=STRENGTH)
    transformer.unload_lora()
    fused = transformer.state_dict()
    expected = {key: fused[diffusers_name(key)] for key in plain("transformer")}
    check_merged(base(folder), folder / "pytorch_lora_weights.safetensors", expected)
    return "merged: equal to what diffusers fuses"


def left_out(folder: Path) -> str:
    """What a text-to-video model lacks."""
    tensors, expected = {}, dict(plain("transformer"))
    for module, (down, up) in factors().items():
        tensors |= {f"diffusion_model.{module}{end}": part for end, part in zip(A_B, (down, up), strict=True)}
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + STRENGTH * (up @ down)
    for name in ("blocks.0.cross_attn.k_img", "img_emb.proj.1"):
        tensors |= {f"diffusion_model.{name}{end}": torch.ones(4, 4) for end in A_B}
    check_merged(base(folder), saved(folder / "lora.safetensors", tensors), expected)
    return f"{MERGED}; the modules for images are left out, with a warning"


def no_lora(**parts: Tensor) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        lora = saved(folder / "lora.safetensors", parts, prefix="diffusion_model.blocks.0.ffn.0.")
        model = base(folder)
        return refused(lora, lambda path: load_transformer(model, loras=[(path, 1.0)]))

    return tries


def of_another_size(folder: Path) -> str:
    ends = {"lora_A.weight": torch.ones(4, 5120), "lora_B.weight": torch.ones(13824, 4)}
    return no_lora(**ends)(folder)


HEADER = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": RANK})}
FULL = {
    "blocks.0.self_attn.q.weight": "diffusion_model.blocks.0.self_attn.q.diff",
    "blocks.0.self_attn.q.bias": "diffusion_model.blocks.0.self_attn.q.diff_b",
    "blocks.0.self_attn.norm_q.weight": "diffusion_model.blocks.0.self_attn.norm_q.diff",
    "blocks.1.modulation": "diffusion_model.blocks.1.diff_m",
    "head.head.weight": "diffusion_model.head.head.diff",
    "time_projection.1.weight": "diffusion_model.time_projection.1.diff",
    "text_embedding.0.bias": "diffusion_model.text_embedding.0.diff_b",
    "time_embedding.2.weight": "diffusion_model.time_embedding.2.diff",
}
NORMS = {
    "blocks.1.norm3.weight": "lycoris_blocks_1_norm3.w_norm",
    "blocks.1.norm3.bias": "lycoris_blocks_1_norm3.b_norm",
}
SUFFIXES = (
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
FACTOR = torch.ones(4, 4)

CASES = (
    Case("LoRA, `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.alpha`", "kohya, musubi-tuner",
         pairs(underscored("lora_unet_"), DOWN_UP, 2.0)),
    Case("LoRA, `lora_unet__blocks_0_cross_attn_k.…`", "VideoX-Fun", pairs(underscored("lora_unet__"), DOWN_UP, 8.0)),
    Case("LoRA, `diffusion_model.blocks.0.self_attn.q.lora_A.weight`", "diffusion-pipe, ai-toolkit",
         pairs(dotted("diffusion_model."), A_B)),
    Case("LoRA, `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`", "diffusion-pipe, ai-toolkit",
         pairs(dotted("diffusion_model."), DOWN_UP, 2.0)),
    Case("LoRA, `transformer.blocks.0.attn1.to_q.lora_A.weight`", "diffusers' names", pairs(theirs, A_B)),
    Case("LoRA, the same, alpha in `lora_adapter_metadata` of the header", "diffusers' names",
         pairs(theirs, A_B, **HEADER)),
    Case("LoRA, `pytorch_lora_weights.safetensors`", "diffusers itself", of_diffusers),
    Case("LoRA, `adapter_model.safetensors` beside `adapter_config.json`", "peft itself", of_peft()),
    Case("LoRA, the same with `use_rslora`", "peft itself", of_peft(use_rslora=True)),
    Case("LoRA, the same with `use_dora`", "peft itself", of_peft(use_dora=True)),
    Case("LoRA, `base_model.model.blocks.0.….lora_A.default.weight`", "PEFT's names",
         pairs(dotted("base_model.model."), NAMED)),
    Case("LoRA, `pipe.dit.blocks.0.….lora_A.default.weight`", "DiffSynth", pairs(dotted("pipe.dit."), NAMED)),
    Case("LoRA, `blocks.0.….lora_A.default.weight` in a `.pt`", "Pusa", pusa),
    Case("LoRA, `lycoris_blocks_0_self_attn_q.lora_down.weight`, `.alpha`", "LyCORIS",
         pairs(underscored("lycoris_"), DOWN_UP, 2.0)),
    *(Case(f"LoRA, `….q{down}`, `{up}`", "other trainers", pairs(dotted("diffusion_model."), (down, up)))
      for down, up in SUFFIXES),
    Case("`.diff`, `.diff_b`, `.diff_m` of matrices, biases, norms and modulations", "LightX2V, CausVid, FusionX",
         differences(FULL)),
    Case("`.w_norm`, `.b_norm`", "LyCORIS", differences(NORMS)),
    Case("DoRA, `.dora_scale`", "LyCORIS, OneTrainer", dora),
    Case("LoRA of an image-to-video model, `k_img`, `img_emb`", "any", left_out),
    Case("LoRA of 14B on another size", "any", of_another_size),
    Case("`.set_weight`, `.reshape_weight`", "control LoRAs", no_lora(set_weight=FACTOR)),
    Case("LoHa", "LyCORIS", no_lora(hada_w1_a=FACTOR, hada_w1_b=FACTOR)),
    Case("LoKr", "LyCORIS", no_lora(lokr_w1=FACTOR, lokr_w2=FACTOR)),
    Case("OFT, BOFT", "LyCORIS", no_lora(oft_blocks=FACTOR)),
    Case("GLoRA", "LyCORIS", no_lora(**{"a1.weight": FACTOR, "b1.weight": FACTOR})),
)  # fmt: skip
