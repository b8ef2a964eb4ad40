"""Networks at the published widths, random weights: `python bench/bench_forward.py [1.3B] [14B] [videocrafter2]`.

Ours, with attention by SDPA and by whatever `auto` chooses, against diffusers' network of the same weights (SDPA),
eager and with each block compiled (diffusers' `compile_repeated_blocks`, which compiles one block for all), in turns: a
window whose frames all have their own noise level, 64 tokens of text in 512 rows. Ours is given the text encoded once,
as the engine does; diffusers' network cannot be. On a GPU: 21 latent frames of 480×832 in two guidance branches, 1.3B
whole and four blocks of 14B. On a CPU: one thread, 3 latent frames of 30×52, four blocks of 1.3B. diffusers' network
embeds the noise level of each token, once a forward: the fewer the blocks, the more that weighs, so that a ratio over
few blocks flatters ours.

Rows are appended to bench/results/forward_<device>.csv, on a GPU one as soon as a contender has run, and say which
attention `auto` took; the share of the matmul ceiling counts the work of the published network's blocks. Both networks
are held against each other first, at a small size.

videocrafter2 is its UNet alone, in bfloat16: one window of 320×512 (`--frames` latent frames), its time and its memory,
in bench/results/unet_<device>.csv. No other library has this network.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable

import result_files
import timing
import torch
from engine_runs import random_transformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from miga_engine.models.videocrafter2.unet import VIDEOCRAFTER2_CONFIG, VideoUNet
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig

DEVICE = result_files.DEVICE
BATCH, FRAMES, HEIGHT, WIDTH = (2, 21, 60, 104) if DEVICE == "cuda" else (1, 3, 30, 52)
BLOCKS = {"1.3B": 30, "14B": 4} if DEVICE == "cuda" else {"1.3B": 4, "14B": 1}
NUM_TEXT = 64
CONFIGS = dict(WAN_T2V_CONFIGS)
if result_files.IS_SMALL:
    BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 8, 12
    BLOCKS = dict.fromkeys(BLOCKS, 2)
    small = {"dim": 256, "ffn_dim": 64, "num_heads": 2, "text_dim": 32}
    CONFIGS = {name: dataclasses.replace(config, **small) for name, config in CONFIGS.items()}
UNET_COLUMNS = (
    "model", "shape", "dtype", "min_ms", "samples", "flops", "tflop_per_s", "of_ceiling", "weights_mib", "forward_mib",
    "peak_mib", *result_files.ENVIRONMENT,
)  # fmt: skip
FP32_TOLERANCE = 3e-5  # of the largest output, as in tests/models/test_models_dit.py


def num_flops(config: WanDiTConfig, batch: int, num_tokens: int) -> int:
    """Of the blocks of the published network, which attends to all rows of the text."""
    dim = config.dim
    by_token = 2 * 6 * dim**2 + 4 * dim * config.ffn_dim + 4 * dim * (num_tokens + config.text_len)
    return batch * config.num_layers * (num_tokens * by_token + config.text_len * 4 * dim**2)


def window(config: WanDiTConfig, batch: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, C, F, H, W], timesteps [B, F] and context [B, 512, D], zero behind the text."""
    latents = torch.randn(batch, config.in_dim, frames, height, width, device=DEVICE)
    timesteps = torch.linspace(20, 980, frames, device=DEVICE).round().expand(batch, frames).contiguous()
    context = torch.zeros(batch, config.text_len, config.text_dim, device=DEVICE)
    context[:, :NUM_TEXT] = torch.randn(batch, NUM_TEXT, config.text_dim, device=DEVICE)
    return latents, timesteps, context


def ours(network: WanDiT, latents: Tensor, timesteps: Tensor, context: Tensor) -> Callable[[], Tensor]:
    latents, cache = latents.to(network.dtype), network.encode_context(context)
    rows = torch.arange(len(latents), device=DEVICE)
    return lambda: network(latents, timesteps, cache, rows)


def theirs(network: nn.Module, dtype: torch.dtype, latents: Tensor, timesteps: Tensor, context: Tensor):
    """diffusers takes a timestep for every token."""
    tokens = timesteps.repeat_interleave(latents.shape[3] * latents.shape[4] // 4, dim=1)
    latents, context = latents.to(dtype), context.to(dtype)
    return lambda: network(latents, tokens, context, return_dict=False)[0]


def compiled(network: nn.Module) -> nn.Module:
    """A copy of diffusers' network whose blocks are compiled, one for all where diffusers can."""
    network = copy.deepcopy(network)
    if hasattr(network, "compile_repeated_blocks"):
        network.compile_repeated_blocks(fullgraph=True, dynamic=False)
    else:
        for block in network.blocks:
            block.compile(fullgraph=True, dynamic=False)
    return network


def check(name: str, config: WanDiTConfig, dtype: torch.dtype, network: WanDiT, rival: nn.Module | None) -> None:
    """Ours against theirs in float32; in half precision both against that, ours at most twice as far."""
    arguments = window(config, 1, 3, 8, 12)
    if rival is None:
        return
    if dtype == torch.float32:
        exact, out = theirs(rival, dtype, *arguments)(), ours(network, *arguments)()
        off = ((out - exact).abs().max() / exact.abs().max()).item()
        assert off <= FP32_TOLERANCE, f"{name}: ours and diffusers' output differ by {off:.1e}: nothing is measured"
        return
    from baseline_diffusers import transformer

    weights = {key: tensor.float() for key, tensor in network.state_dict().items()}
    exact = theirs(transformer(config, weights, DEVICE, torch.float32), torch.float32, *arguments)()
    results = (theirs(rival, dtype, *arguments)(), ours(network, *arguments)())
    rival_off, off = (((out.float() - exact).norm() / exact.norm()).item() for out in results)
    assert off <= 2 * rival_off, f"{name}: ours is {off:.1e} from float32, diffusers' {rival_off:.1e}: not measured"


@torch.inference_mode()
def compare(name: str, dtype: torch.dtype, num_blocks: int, repeats: int, with_compiled: bool) -> None:
    config = dataclasses.replace(CONFIGS[name], num_layers=num_blocks)
    torch.manual_seed(0)
    network = random_transformer(config, DEVICE, dtype)
    rival = None
    if result_files.has_diffusers():
        from baseline_diffusers import transformer

        rival = transformer(config, network.state_dict(), DEVICE, dtype)
    check(name, config, dtype, network, rival)
    arguments = window(config, BATCH, FRAMES, HEIGHT, WIDTH)
    run = ours(network, *arguments)

    def with_attention(backend: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            network.attention = backend
            return run()

        return call

    contenders = {"op auto": with_attention("auto"), "op": with_attention("sdpa")}
    if rival is not None:
        contenders["eager"] = theirs(rival, dtype, *arguments)
        if with_compiled:
            contenders["compiled"] = theirs(compiled(rival), dtype, *arguments)
    num_tokens = FRAMES * HEIGHT * WIDTH // 4
    timing.compare(
        f"forward_{DEVICE}",
        f"forward {name}",
        f"{config.num_layers} blocks, {BATCH}×{FRAMES}×{HEIGHT}×{WIDTH}",
        dtype,
        contenders,
        DEVICE,
        repeats=repeats,
        notes={"compiled": "by block"},
        num_flops=num_flops(config, BATCH, num_tokens),
    )


def unet(num_frames: int, repeats: int) -> None:
    """Time and memory of VideoCrafter2's UNet over a window whose frames all have their own noise level."""
    dtype, shape = torch.bfloat16, (1, VIDEOCRAFTER2_CONFIG.in_channels, num_frames, 40, 64)
    with torch.device("meta"):
        network = VideoUNet(VIDEOCRAFTER2_CONFIG).eval().requires_grad_(False)
        arguments = torch.empty(shape), torch.empty(1, num_frames), torch.empty(1, 77, VIDEOCRAFTER2_CONFIG.context_dim)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.miga.frame_attention: _attention_flops}) as counter:
        network(*arguments)
    torch.manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        stored = torch.float32 if VideoUNet.keeps_fp32(name) else dtype
        state[name] = torch.empty(tensor.shape, dtype=stored, device=DEVICE).normal_(std=0.02)
    network.load_state_dict(state, assign=True)
    latents = torch.randn(shape, dtype=dtype, device=DEVICE)
    cache = network.encode_context(torch.randn(arguments[2].shape, device=DEVICE))
    levels = network.encode_timesteps(torch.linspace(0, 999, num_frames, device=DEVICE).round())
    rows = torch.arange(num_frames, device=DEVICE)[None]
    before = torch.cuda.memory_allocated() / 2**20 if DEVICE == "cuda" else result_files.resident_mib()
    samples = timing.interleave({"op": lambda: network(latents, (levels, rows), cache)}, DEVICE, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else result_files.peak_resident_mib()
    assert network(latents[:, :, :1], (levels, rows[:, :1]), cache).isfinite().all()
    rate = counter.get_total_flops() / timing.best(samples["op"], DEVICE) / 1e9
    row: dict[str, object] = {"model": "videocrafter2", "shape": "×".join(map(str, shape)), "dtype": "bfloat16"}
    row |= {"min_ms": f"{samples['op'][0]:.4g}", "samples": repeats, "flops": counter.get_total_flops()}
    row |= {"tflop_per_s": f"{rate:.4g}", "of_ceiling": f"{rate / timing.matmul_ceiling(DEVICE, dtype):.3f}"}
    row |= {"weights_mib": f"{sum(t.nbytes for t in state.values()) / 2**20:.1f}"}
    row |= {"forward_mib": f"{peak - before:.1f}", "peak_mib": f"{peak:.1f}"}
    print(result_files.record(f"unet_{DEVICE}", UNET_COLUMNS, [row], DEVICE))


def _attention_flops(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
    return 4 * q.numel() * k[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="1.3B, 14B, videocrafter2 (default: 1.3B, on a GPU 14B too)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU both")
    parser.add_argument("--blocks", type=int, help="(default: see above)")
    parser.add_argument("--frames", type=int, default=16, help="latent frames of videocrafter2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile(diffusers) out")
    options = parser.parse_args()
    known = [*CONFIGS, "videocrafter2"]
    if unknown := set(options.models) - set(known):
        parser.error(f"there is no model {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    for name in options.models or (list(BLOCKS) if DEVICE == "cuda" else ["1.3B"]):
        if name == "videocrafter2":
            with torch.inference_mode():
                unet(options.frames, options.repeats)
            continue
        for dtype in options.dtypes or (["bfloat16"] if DEVICE == "cuda" else ["float32", "bfloat16"]):
            blocks = options.blocks or BLOCKS[name]
            try:
                compare(name, getattr(torch, dtype), blocks, options.repeats, not options.no_compiled)
            except Exception as error:  # the other networks are still measured
                result_files.fault(error, DEVICE, op=f"forward {name}", dtype=dtype)


if __name__ == "__main__":
    main()
    sys.exit(result_files.exit_status())
