"""The good files that the fuzzer begins with: one folder for each layout, small but for the embedded model's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

from fuzz_targets import DIT, SESSIONS, SHARD, VAE


def sentencepiece_model() -> bytes:
    """A small vocabulary as SentencePiece stores one, with the ids of umt5's special pieces."""
    from miga_engine.models.wan.spiece import spiece_of_gguf

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁red", "ball", "oon", "é", "木"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    start = "tokenizer.ggml."
    return spiece_of_gguf(
        {
            start + "model": "t5",
            start + "tokens": ["<pad>", "</s>", "<unk>", *bytes_, *letters],
            start + "scores": [0.0] * 259 + [-float(i) for i in range(len(letters))],
            start + "token_type": [3, 3, 2] + [6] * 256 + [1] * len(letters),
        },
        "fuzz",
    )


def build_pristine(root: Path) -> None:
    """One good folder for each layout, small but for the embedded model's."""
    import gguf
    import golden_model
    import numpy as np
    import random_wan
    import torch
    import yaml
    from safetensors.torch import load_file, save_file

    from miga_engine.engine import Engine
    from miga_engine.models.wan.tae import TinyDecoder, TinyDecoderConfig
    from miga_engine.tiny import WEIGHTS_DIR
    from miga_engine.video.outputs import open_sink

    goldens = golden_model.GOLDENS
    for layout in (
        "wan",
        "vc2",
        "shards",
        "gguf",
        "scaled",
        "lora",
        "spiece",
        "pth",
        "ckpt",
        "clip",
        "clip_gz",
        "clip_json",
        "options",
        "session",
        "mp4",
        "mkv",
    ):
        (root / layout).mkdir()
    shutil.copytree(
        WEIGHTS_DIR, root / "tiny", ignore=lambda _, names: [n for n in names if n.startswith("classifier")]
    )
    golden_model.build(root / "wan")
    golden_model.build_videocrafter2(root / "vc2")
    shutil.copytree(goldens / "wan_vae" / "diffusers", root / "diffusers" / "vae")
    torch.save(load_file(goldens / "wan_vae" / "official" / VAE), root / "pth" / "Wan2.1_VAE.pth")
    torch.save({"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2).half()}}, root / "ckpt" / "model.ckpt")

    spiece = sentencepiece_model()
    (root / "spiece" / "spiece.model").write_bytes(spiece)
    random_wan.comfy(root / "comfy")
    inside = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    save_file(
        random_wan.text_encoder("hf") | inside,
        root / "comfy" / "models" / "text_encoders" / "umt5_xxl_fp16.safetensors",
    )
    decoder = TinyDecoder(TinyDecoderConfig(widths=(16, 12, 8, 8))).state_dict()
    save_file(decoder, root / "comfy" / "models" / "vae_approx" / "taew2_1.safetensors")
    save_file(random_wan.scaled_fp8(random_wan.transformer()), root / "scaled" / "scaled.safetensors")
    save_file(random_wan.transformer(), root / "lora" / "wan.safetensors")
    pairs = {
        f"base_model.model.blocks.{i}.{module}.lora_{part}.weight": torch.ones(shape)
        for i in range(2)
        for module, wide, out in (("self_attn.q", 128, 128), ("ffn.0", 128, 256), ("cross_attn.o", 128, 128))
        for part, shape in (("A", (4, wide)), ("B", (out, 4)))
    }
    pairs["base_model.model.blocks.0.self_attn.q.lora_magnitude_vector"] = torch.ones(128)
    save_file(pairs, root / "lora" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"ffn.0": 2}}
    (root / "lora" / "adapter_config.json").write_text(json.dumps(said))

    writer, q8 = gguf.GGUFWriter(root / "gguf" / "wan.gguf", "wan"), gguf.GGMLQuantizationType.Q8_0
    for i, (key, tensor) in enumerate(load_file(root / "wan" / DIT).items()):
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(key, gguf.quants.quantize(tensor.float().numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(key, tensor.half().numpy() if i % 2 else tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copy(root / "wan" / "config.json", root / "gguf")

    tensors, weight_map = load_file(root / "wan" / DIT), {}
    for i in range(2):
        file, keys = SHARD.replace("00001", f"0000{i + 1}", 1), sorted(tensors)[i::2]
        save_file({key: tensors[key] for key in keys}, root / "shards" / file)
        weight_map |= dict.fromkeys(keys, file)
    (root / "shards" / f"{DIT}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(root / "wan" / "config.json", root / "shards")
    os.mkfifo(root / "shards" / "pipe.safetensors")
    (root / "shards" / "link.safetensors").symlink_to("/etc/passwd")
    (root / "shards" / "device.safetensors").symlink_to("/dev/zero")

    merges = "#version: 0.2\na b</w>\nc d\nr e\nre d</w>\n"
    (root / "clip" / "merges.txt").write_text(merges)
    (root / "clip_gz" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(merges.encode())  # packed when it is broken
    pairs = [line.split() for line in merges.splitlines()[1:]]
    (root / "clip_json" / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": pairs}}))

    options = {
        "prompt": "a red balloon", "negative_prompt": "blurry", "num_frames": 30, "seed": 3, "height": 64,
        "width": 96, "fps": 12,
        "guidance_scale": 3.0, "num_inference_steps": 24, "solver": "unipc", "shift": 3.0, "eta": 1.0,
        "use_scale_array": False,
    }  # fmt: skip
    (root / "options" / "request").write_text(json.dumps(options))
    extra = {"prompt_at": [[10, "a blue kite"]], "model": "tiny", "device": "cpu", "method": "miga",
    "output": "a.mp4", "overwrite": False,
             "events": None, "zigzag_width": 4, "stage2_steps": 5, "score_drop": 0.2, "judge": "x0",
             "self_reflection": True}  # fmt: skip
    (root / "options" / "run.yaml").write_text(yaml.safe_dump(options | extra))

    engine = Engine.from_pretrained(root / "wan", "cpu", "float32")
    with engine.stream("a kite", num_frames=30, seed=1, miga=golden_model.MIGA, **golden_model.OPTIONS) as stream:
        next(stream)
        stream.save(root / "session" / "run.safetensors")
    for (name, num_ticks), video in zip(SESSIONS.items(), ("a.rgb", "a.mp4", "a.mkv", "a/", "a.rgb"), strict=True):
        folder = root / f"session_{name}"
        folder.mkdir()
        engine.name = "tiny"
        miga = dataclasses.replace(golden_model.MIGA, guidance_anchor=name != "early", score_drop=-1.0, candidates=2)
        clip = torch.arange(9 * 32 * 48 * 3).view(9, 32, 48, 3).to(torch.uint8)
        given = {"seed clip": {"image": clip[0]}, "early": {"video": clip}}.get(name, {})
        miga = dataclasses.replace(miga, reference_sigma=0.02 if given else None)
        ticks = iter(range(1, 10**6))
        stream = engine.stream(
            {0: "a kite", 12: "a balloon"}, num_frames=45, seed=1, miga=miga, **golden_model.OPTIONS, **given,
            is_cancelled=lambda ticks=ticks, num_ticks=num_ticks: next(ticks) > num_ticks,
        )  # fmt: skip
        output = os.path.join(folder, video)
        with stream, open_sink(output, 16, 48, 32, metadata=stream.request.metadata("tiny")) as sink:
            stream.save_every(None, folder / "run.safetensors", sink, keep_extension=True)
            for chunk in stream:
                sink.write(chunk.frames)
            stream.save(folder / "run.safetensors", sink)
        (folder / "run.previous.safetensors").unlink(missing_ok=True)
    victims = root / "victims"
    victims.mkdir()
    for name in ("a.rgb", "a.mp4", "a.mkv", "000000.png", "000001.png", "notes.txt"):
        (victims / name).write_bytes(b"hours of work " * 1000)
    frames = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    for suffix in ("mp4", "mkv"):
        with open_sink(root / suffix / f"a.{suffix}", 12, 48, 32, metadata={"prompt": "a kite", "seed": 3}) as sink:
            sink.write(frames)
