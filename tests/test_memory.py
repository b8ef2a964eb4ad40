"""The memory a run needs: estimated from shapes alone, against what a fresh process takes."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import golden_model
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miga_engine import Engine
from miga_engine.config import MigaConfig
from miga_engine.device import amount
from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.memory import Ledger, choose_window_batch, peak_resident_bytes, resident_bytes
from miga_engine.models.loading import file_bytes
from miga_engine.models.wan.dit import WAN22_TI2V_5B, WAN_T2V_CONFIGS, WanDiT
from miga_engine.models.wan.umt5 import UMT5Config, UMT5Encoder
from miga_engine.models.wan.vae import WAN22_VAE, WanVAE

UNITS = {"MiB": 2**20, "GiB": 2**30}
FEW_STEPS = ["--num-frames", "5", "--num-inference-steps", "9", "--stage2-steps", "2", "--judge-step", "3"]
NOTHING_HELD_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured through /proc")
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (FEW_STEPS, {}),
        ([*FEW_STEPS, "--dtype", "bfloat16", "--refine-steps", "2", "--score-drop", "-1"], NOTHING_HELD_BACK),
        (
            [
                *FEW_STEPS,
                "--num-inference-steps",
                "6",
                "--no-self-reflection",
                "--height",
                "128",
                "--width",
                "192",
                "--zigzag-width",
                "4",
                "--window-batch",
                "4",
            ],
            NOTHING_HELD_BACK,
        ),
    ],
    ids=["default size", "bfloat16, refine, reflection", "four windows"],
)
def test_a_run_takes_what_was_estimated(options, environment, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "miga_engine", "generate", "a red balloon", "--device", "cpu", *options, "-q",
         "-o", str(tmp_path / "video.mp4")],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    line = re.search(r"^memory: (\S+) (\S+) at most \(estimated (\S+) (\S+)\)$", result.stderr, re.MULTILINE)
    assert line, result.stderr
    peak, estimated = (float(line[i]) * UNITS[line[i + 1]] for i in (1, 3))
    assert abs(estimated / peak - 1) <= 0.1, line[0]


def _write_headers(folder: Path, name: str, module: nn.Module, shards: int = 1) -> int:
    """Sparse safetensors files in bfloat16 with headers and no data; the number of parameters."""
    tensors = list(module.state_dict().items())
    weight_map = {}
    for shard in range(shards):
        file = f"{name}-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{name}.safetensors"
        header, end = {}, 0
        for key, tensor in tensors[shard::shards]:
            start, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
            weight_map[key] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    if shards > 1:
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.numel() for _, tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shards", "parameters"), [("1.3B", 1, 1.42e9), ("14B", 6, 14.29e9)])
def test_published_models_are_estimated_from_their_headers(size, shards, parameters, tmp_path):
    with torch.device("meta"):
        count = _write_headers(tmp_path, "diffusion_pytorch_model", WanDiT(WAN_T2V_CONFIGS[size]), shards)
        _write_headers(tmp_path, "Wan2.1_VAE", WanVAE())
        _write_headers(
            tmp_path, "models_t5_umt5-xxl-enc-bf16", UMT5Encoder(UMT5Config(256, 4096, 4096, 10240, 64, 2, 32))
        )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert count == pytest.approx(parameters, rel=0.01)

    before, started = resident_bytes(), time.process_time()
    estimate = Engine.estimate(tmp_path, device="cuda")
    assert time.process_time() - started < 10  # reading or allocating the weights would take far more
    assert peak_resident_bytes() - before < count
    one, four = estimate.resident, Engine.estimate(tmp_path, device="cuda", window_batch=4)
    assert 2 * count <= one["transformer weights"] < 2.1 * count  # norms, modulation and the time path are float32

    # Latent frames in the rings: 7 frames a level for 45 levels, the wavefront of 10 levels, 3 candidates of 10 groups.
    frames = 7 * 45 + 10 * (21 + 10) + 21 + 7 + 3 * 10 * 7
    assert one["rings of latent frames"] == 4 * frames * 16 * 60 * 104 * 4
    assert one["network outputs of a pass"] == pytest.approx(2 * (frames + 1) * 16 * 60 * 104 * 4, rel=1e-3)
    config = WAN_T2V_CONFIGS[size]
    keys = 2 * config.num_layers * 2 * (config.text_len + 1) * config.dim * 2
    levels = 54 * 7 * config.dim * 4
    assert one["prompt keys and values, noise levels"] == pytest.approx(keys + levels, rel=0.01)
    assert estimate.device_total == sum(one.values()) + max(estimate.peaks.values())
    assert "cpu" not in str(estimate)

    # What a forward must hold at the least: both branches' residual stream in float32, and the hidden layer.
    tokens = 2 * 21 * 30 * 52
    extra = four.peaks["forward, with decoding beside it"] - estimate.peaks["forward, with decoding beside it"]
    per_token = extra / 3 / tokens
    assert 4 * config.dim + 2 * config.ffn_dim < per_token < 16 * config.dim + 2 * config.ffn_dim


@pytest.mark.slow
def test_wan22_ti2v_is_estimated_from_its_headers(tmp_path):
    with torch.device("meta"):
        count = _write_headers(tmp_path, "diffusion_pytorch_model", WanDiT(WAN22_TI2V_5B), 3)
        of_vae = _write_headers(tmp_path, "Wan2.2_VAE", WanVAE(WAN22_VAE))
        _write_headers(
            tmp_path, "models_t5_umt5-xxl-enc-bf16", UMT5Encoder(UMT5Config(256, 4096, 4096, 10240, 64, 2, 32))
        )
    (tmp_path / "tokenizer.json").write_text("{}")
    estimate = Engine.estimate(tmp_path, device="cuda", height=704, width=1280)
    assert 2 * count <= estimate.resident["transformer weights"] < 2.1 * count
    assert estimate.resident["VAE weights"] == pytest.approx(4 * of_vae, rel=1e-6)
    # Frames of all convolutions that look back; of those at the last level alone more than half a gibibyte.
    last = 352 * 640 * 4
    assert estimate.resident["decoder feature cache"] > 2 * last * (512 + 5 * 256 + 256)
    assert estimate.peaks["forward, with decoding beside it"] > 2**30


def test_the_ledger_counts_what_is_alive_and_nothing_twice():
    weight = torch.empty(100, 100, device="meta")
    with Ledger("cpu") as ledger:
        x = torch.empty(50, 100, device="meta")
        assert ledger.current == 20_000
        view = weight.t()[:10]  # neither the weight nor a view of it is new
        assert ledger.current == 20_000
        assert ledger.peak_of(lambda: x.matmul(weight).relu().sum()) == 2 * 20_000
        assert ledger.current == 20_000
        index = torch.arange(3)  # a table on the CPU, as the runtime's are
        picked = x.index_select(0, index)
        assert ledger.current == 20_000 + 1_200
        x.index_copy_(0, index, picked)
        assert ledger.current == 20_000 + 1_200
        view = picked = None
        assert ledger.current == 20_000
    assert view is picked


def test_attention_counts_by_the_device_it_is_meant_for():
    q = torch.empty(1, 1024, 2, 32, device="meta")
    needs = {}
    for device in ("cpu", "cuda"):
        with Ledger(device) as ledger:
            needs[device] = ledger.peak_of(
                functools.partial(torch.ops.miga.frame_attention, q, q, q, None, None, None, "auto")
            )
    assert q.nbytes < needs["cuda"] < needs["cpu"]


@pytest.mark.slow
def test_estimate_follows_the_request(tmp_path):
    folder = golden_model.build(tmp_path / "model")
    options = {"device": "cpu", "miga": golden_model.MIGA, **golden_model.OPTIONS}
    base = Engine.estimate(folder, **options)
    parts = {name: size for group in (base.resident, base.peaks, base.process) for name, size in group.items()}
    assert base.parts == parts
    assert all(size >= 0 for size in parts.values())
    for name, size in parts.items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(amount(size))}$", str(base), re.MULTILINE)
    assert base.host_total == base.device_total + sum(base.process.values())

    def forward(**changed: object) -> int:
        return Engine.estimate(folder, **{**options, **changed}).peaks["forward"]

    one = base.peaks["forward"]
    assert one < forward(window_batch=2) < forward(window_batch=4)
    assert forward(window_batch=1000) == forward(window_batch=2000)  # no pass has so many windows
    assert forward(guidance_scale=1.0) < one
    assert forward(height=64) > one
    assert forward(dtype="bfloat16") < one
    quiet = Engine.estimate(folder, **{**options, "miga": MigaConfig(**{**vars(golden_model.MIGA),
                                                                        "self_reflection": False})})  # fmt: skip
    assert quiet.resident["rings of latent frames"] < base.resident["rings of latent frames"]
    state = torch.random.get_rng_state()
    Engine.estimate(folder, **options)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
def test_networks_in_one_file_are_counted_once(tmp_path):
    """Each network of VideoCrafter2's file is mapped by itself, and its text tower's last block is never read."""
    golden_model.build_videocrafter2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last_block = "cond_stage_model.model.transformer.resblocks.1."
    unread = {key: tensor for key, tensor in tensors.items() if key.startswith(last_block)}
    assert unread
    prefixes = {
        "transformer": "model.diffusion_model.",
        "VAE": "first_stage_model.",
        "text encoder": "cond_stage_model.",
    }
    expected = {
        name: sum(t.nbytes for key, t in tensors.items() if key.startswith(prefix) and key not in unread)
        for name, prefix in prefixes.items()
    }
    assert file_bytes(tmp_path) == expected

    options = golden_model.FAMILIES["videocrafter2"].options
    small, large = (Engine.estimate(tmp_path, **options | {"height": size}) for size in (8, 64))
    assert 0 < small.device_total < large.device_total
    # float32 copies of one network after the other; while the largest is copied, its part of the file is mapped too.
    assert small.peaks["loading (files mapped)"] < max(expected.values())
    mapped = Engine.estimate(tmp_path, device="cuda", **options).process["weights files (mapped)"]
    assert mapped == max(expected.values())


def test_estimate_refuses_what_a_run_refuses(tmp_path):
    with pytest.raises(CheckpointError, match="there is no model at"):
        Engine.estimate(tmp_path / "missing")
    with pytest.raises(ConfigError, match="width must be a multiple of 16 pixels"):
        Engine.estimate(device="cpu", width=100)
    with pytest.raises(ConfigError, match="window_batch must be a whole number of at least 1"):
        Engine.estimate(device="cpu", window_batch=0)


def test_window_batch_is_the_largest_power_of_two_that_fits():
    def needs(batch: int) -> int:
        return 100 + 10 * batch

    assert choose_window_batch(needs, free_bytes=None) == 1
    assert choose_window_batch(needs, free_bytes=50) == 1  # not even one fits: nothing smaller can be tried
    assert choose_window_batch(needs, free_bytes=175) == 4  # 140 is 80 % of 175
    assert choose_window_batch(needs, free_bytes=174) == 2
    assert choose_window_batch(needs, free_bytes=10**9) == 64
    assert choose_window_batch(needs, free_bytes=10**9, most=20) == 16


@pytest.mark.slow
def test_the_prompts_of_a_config_are_counted(tmp_path, capsys) -> None:
    """And of many no more than the queue shows at once, with their blends."""
    from miga_engine.cli import main

    def cache(num_prompts: int, blend: int, every: int = 40) -> float:
        lines = [f"  {every * i}: a kite number {i}" for i in range(num_prompts)]
        path = tmp_path / "run.yaml"
        path.write_text("\n".join(["num_frames: 5000", f"prompt_blend_frames: {blend}", "prompt:", *lines]))
        assert main(["estimate", "--config", str(path)]) == 0
        told = re.search(r"prompt keys and values, noise levels +(\S+) (MiB|GiB)", capsys.readouterr().out)
        return float(told[1]) * UNITS[told[2]]

    one, two, fifty, hundred = (cache(count, 0) for count in (1, 2, 50, 100))
    assert one < two < fifty
    assert hundred <= 1.01 * fifty
    assert cache(100, 16) <= 1.01 * cache(50, 16)
    assert cache(2, 16) > two
