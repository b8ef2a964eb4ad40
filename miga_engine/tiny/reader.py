"""The network that reads the rich world from frames: every factor a caption may name, and where the subject is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from miga_engine.errors import ConfigError
from miga_engine.tiny import WEIGHTS_DIR, world
from miga_engine.tiny.classifier import to_tensor

CLASSES: dict[str, tuple[str, ...]] = {
    name: tuple(v for v in values if v) for name, values in world.FACTORS.items() if name != "behind"
}
OF_THE_SUBJECT = ("subject", "colour", "pattern")
LAG = 8  # frames between the two that are looked at: how fast the land goes by shows in no single one


def _block(cin: int, cout: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, stride=stride, padding=1), nn.GroupNorm(8, cout), nn.SiLU())


class SceneReader(nn.Module):
    """Reads factors and the subject's place in the first of two frames, 8 apart, `[N,6,H,W]` in [-1,1]."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(6, 24, 2), _block(24, 48, 2), _block(48, 48, 1))
        self.coarse = nn.Sequential(_block(48, 64, 2), _block(64, 64, 1), _block(64, 64, 1))
        self.cover = nn.Sequential(_block(112, 32, 1), nn.Conv2d(32, 1, 1))
        # means and maxima over the picture, and means where the subject is
        width = 2 * 64 + 112
        self.heads = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, len(c))) for n, c in CLASSES.items()}
        )

    def forward(self, pairs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits `[N,classes]` of every factor, and of the subject's share of cells of 4×4 pixels `[N,H/4,W/4]`."""
        fine = self.fine(pairs)
        coarse = self.coarse(fine)
        both = torch.cat([fine, F.interpolate(coarse, size=fine.shape[2:])], 1)
        cover = self.cover(both)[:, 0]
        share = cover.detach().sigmoid().flatten(1)  # [N,cells]
        there = (both.flatten(2) * share[:, None]).sum(2) / (share.sum(1, keepdim=True) + 1)
        x = torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3)), there], 1)
        return {name: head(x) for name, head in self.heads.items()}, cover


@dataclass(frozen=True)
class Reading:
    """What is read from T frames: of each factor the class of each frame `[T]`, the share of the picture that the
    subject covers `[T]`, its centre (column, row) `[T,2]` and box (left, top, right, bottom) `[T,4]` in shares of the
    picture, not a number where no subject is seen."""

    factors: dict[str, npt.NDArray[np.int64]]
    area: npt.NDArray[np.float64]
    centre: npt.NDArray[np.float64]
    box: npt.NDArray[np.float64]

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Whether enough of the subject shows `[T]` to tell what it looks like."""
        return np.asarray(self.area > 0.015)

    def most(self, factor: str, frames: slice = slice(None)) -> str:
        """The class that most of these frames show; of what the subject looks like, most of those that show it."""
        shown, seen = self.factors[factor][frames], self.seen[frames]
        if factor in OF_THE_SUBJECT and seen.any():
            shown = shown[seen]
        return CLASSES[factor][int(np.bincount(shown).argmax())]


def load_reader(path: Path | None = None) -> SceneReader:
    """The reader of a file, or the one beside the weights; ConfigError where there is none."""
    path = path or WEIGHTS_DIR / "reader.safetensors"
    if not path.is_file():
        raise ConfigError(f"there is no reader at {path}: give the file that `python -m bench.tiny.train export` wrote")
    model = SceneReader()
    state = load_file(path)
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval()


def paired(video: Tensor) -> Tensor:
    """Each frame of `[T,3,H,W]` with the one 8 later, or at the end 8 earlier, as `[T,6,H,W]`."""
    t = torch.arange(len(video))
    other = torch.where(t + LAG < len(video), t + LAG, (t - LAG).clamp(min=0))
    return torch.cat([video, video[other]], 1)


@torch.no_grad()
def read(model: SceneReader, frames: npt.NDArray[np.uint8], batch: int = 64) -> Reading:
    """Reads a video uint8 `[T,H,W,3]`."""
    parts = [model(pairs) for pairs in paired(to_tensor(np.ascontiguousarray(frames))).split(batch)]
    factors = {name: torch.cat([p[0][name] for p in parts]).argmax(1).numpy() for name in CLASSES}
    share = torch.cat([p[1] for p in parts]).sigmoid().double()
    share = torch.where(share > 0.2, share, 0.0)
    total = share.sum((1, 2))
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in share.shape[1:])
    gone = total < 0.5
    centre = torch.stack([(share.sum(1) * x).sum(1), (share.sum(2) * y).sum(1)], 1) / total[:, None]
    inside = share > 0.5
    edges = []
    for covered in (inside.any(1), inside.any(2)):  # columns, rows
        n = covered.shape[1]
        first, last = covered.double().argmax(1), n - 1 - covered.flip(1).double().argmax(1)
        edges.append((first / n, (last + 1) / n))
    box = torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1).double()
    centre[gone], box[gone | ~inside.flatten(1).any(1)] = torch.nan, torch.nan
    return Reading(factors, (total / share[0].numel()).numpy(), centre.numpy(), box.numpy())
