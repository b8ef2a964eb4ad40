"""The transformer at the published widths with random weights: `python bench/bench_forward.py [1.3B] [14B]`.

Ours, with attention by SDPA and by whatever `auto` chooses, against diffusers' network of the same weights (SDPA),
eager and compiled, in turns: a window whose frames all have their own noise level, 64 tokens of text in 512 rows. Ours
is given the text encoded once, as the engine does; diffusers' network cannot be. On a GPU: 21 latent frames of
480×832 in two guidance branches, 1.3B whole and four blocks of 14B. On a CPU: one thread, 3 latent frames of 30×52,
four blocks of 1.3B. diffusers' network embeds the noise level of each token, once a forward: the fewer the blocks, the
more that weighs, so that a ratio over few blocks flatters ours.

Rows are appended to bench/results/forward_<device>.csv; the share of the matmul ceiling counts the work of the
published network's blocks. Both networks are held against each other first, at a small size.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable

import measure
import torch
from bench_engine import random_transformer
from torch import Tensor, nn

from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
BATCH, FRAMES, HEIGHT, WIDTH = (2, 21, 60, 104) if DEVICE == "cuda" else (1, 3, 30, 52)
BLOCKS = {"1.3B": 30, "14B": 4} if DEVICE == "cuda" else {"1.3B": 4, "14B": 1}
NUM_TEXT = 64
FP32_TOLERANCE = 3e-5  # of the largest output, as in tests/test_models_dit.py


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


def check(name: str, config: WanDiTConfig, dtype: torch.dtype, network: WanDiT, rival: nn.Module | None) -> None:
    """Ours against theirs in float32; in half precision both against that, ours at most twice as far."""
    arguments = window(config, 1, 3, 8, 12)
    if rival is None:
        print(f"{name}: diffusers is not installed, so that there is no rival and no check against it")
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
    config = dataclasses.replace(WAN_T2V_CONFIGS[name], num_layers=num_blocks)
    torch.manual_seed(0)
    network = random_transformer(config, DEVICE, dtype)
    rival = None
    if HAS_DIFFUSERS:
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

    contenders = {"op": with_attention("sdpa"), "op auto": with_attention("auto")}
    if rival is not None:
        contenders["eager"] = theirs(rival, dtype, *arguments)
        if with_compiled:
            contenders["compiled"] = theirs(torch.compile(rival, dynamic=False), dtype, *arguments)
    samples = measure.interleave(contenders, DEVICE, repeats)
    shape = f"{config.num_layers} blocks, {BATCH}×{FRAMES}×{HEIGHT}×{WIDTH}"
    flops = num_flops(config, BATCH, FRAMES * HEIGHT * WIDTH // 4)
    for row in measure.append(f"forward_{DEVICE}", f"forward {name}", shape, dtype, samples, DEVICE, num_flops=flops):
        print(
            f"{row['op']} {row['shape']} {row['dtype']:9} {row['implementation']:9} {row['min_ms']:>7} ms, "
            f"{row['rate']} TFLOP/s, {row['of_ceiling']} of the ceiling, times faster than eager diffusers "
            f"{row.get('x_eager', '-')}, compiled {row.get('x_compiled', '-')}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="1.3B and 14B (default: both on a GPU, 1.3B on a CPU)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU both")
    parser.add_argument("--blocks", type=int, help="(default: see above)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile(diffusers) out")
    options = parser.parse_args()
    if unknown := set(options.models) - set(WAN_T2V_CONFIGS):
        parser.error(f"there is no model {', '.join(sorted(unknown))}: choose from {', '.join(WAN_T2V_CONFIGS)}")
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    for name in options.models or (list(BLOCKS) if DEVICE == "cuda" else ["1.3B"]):
        for dtype in options.dtypes or (["bfloat16"] if DEVICE == "cuda" else ["float32", "bfloat16"]):
            blocks = options.blocks or BLOCKS[name]
            compare(name, getattr(torch, dtype), blocks, options.repeats, not options.no_compiled)


if __name__ == "__main__":
    main()
