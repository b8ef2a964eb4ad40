"""The small classifier that ships with the embedded model: it reads a scene's attributes from frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miga_engine.tiny import WEIGHTS_DIR, world

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": world.SUBJECTS,
    "colour": world.COLOURS,
    "terrain": world.TERRAINS,
    "time": world.TIMES,
}


class AttributeClassifier(nn.Module):
    """Reads subject, colour, terrain and time from single frames `[N,3,H,W]` in [-1,1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for cin, cout, stride in ((3, 16, 2), (16, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(cin, cout, 3, stride=stride, padding=1), nn.GroupNorm(8, cout), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, len(names))) for names in ATTRIBUTES.values()
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Logits `[N,classes]` of every attribute, in the order of `ATTRIBUTES`."""
        x = self.body(frames)
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        return [head(x) for head in self.heads]


def load_classifier(path: Path | None = None) -> AttributeClassifier:
    """The classifier that ships beside the weights."""
    model = AttributeClassifier()
    state = load_file(path or WEIGHTS_DIR / "classifier.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval()


@torch.no_grad()
def read_attributes(model: AttributeClassifier, video: Tensor) -> dict[str, str]:
    """The attributes of a clip `[T,3,H,W]` in [-1,1]: per attribute the class most probable over its frames."""
    logits = model(video)
    best = [int(x.log_softmax(-1).mean(0).argmax()) for x in logits]
    return {name: classes[i] for (name, classes), i in zip(ATTRIBUTES.items(), best, strict=True)}


@torch.no_grad()
def frame_accuracy(model: AttributeClassifier, video: Tensor, scene: world.Scene) -> dict[str, float]:
    """Share of the frames `[T,3,H,W]` whose attribute is read as the scene's, per attribute."""
    logits = model(video)
    return {
        name: float((x.argmax(-1) == label).float().mean())
        for name, x, label in zip(ATTRIBUTES, logits, scene.labels, strict=True)
    }


def to_tensor(video: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 `[T,H,W,3]` to float `[T,3,H,W]` in [-1,1]."""
    return torch.from_numpy(video).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
