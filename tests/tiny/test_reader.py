"""The reader of the rich world: its shapes, what it is taught, and what is made of its answers."""

import dataclasses

import numpy as np
import pytest
import torch

from bench.tiny import steps, train_reader
from miga_engine.tiny import reader, world

SCENE = world.Scene("balloon", "red", "green", "noon", 3, "striped", "trees", "clouds", "left", "slow", True, "clouds")


class TrueReader(torch.nn.Module):
    """Says of every frame what it is told: stands for a network that is never wrong."""

    def __init__(self, cover: torch.Tensor, factors: dict[str, list[int]]) -> None:
        super().__init__()
        self.cover, self.factors, self.at = cover, factors, 0

    def forward(self, pairs):
        n, first = len(pairs), self.at
        self.at += n
        logits = {
            name: torch.nn.functional.one_hot(torch.tensor(self.factors[name][first : self.at]), len(values)).float()
            for name, values in reader.CLASSES.items()
        }
        share = torch.nn.functional.avg_pool2d(self.cover[first : self.at, None], 4)[:, 0]
        return logits, torch.logit(share.clamp(1e-6, 1 - 1e-6))


def test_a_reader_answers_for_every_frame_at_any_size():
    model = reader.SceneReader().eval()
    for height, width in ((64, 96), (96, 160)):
        factors, cover = model(torch.zeros(3, 6, height, width))
        assert {n: x.shape for n, x in factors.items()} == {n: (3, len(c)) for n, c in reader.CLASSES.items()}
        assert cover.shape == (3, height // 4, width // 4)
    assert sum(p.numel() for p in model.parameters()) < 400_000


def test_frames_are_paired_with_the_one_8_later():
    video = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 2, 2)
    pairs = reader.paired(video)
    assert pairs[:, 3, 0, 0].tolist() == [*range(8, 20), *range(4, 12)]
    assert reader.paired(video[:3])[:, 3, 0, 0].tolist() == [0, 0, 0]


def test_place_and_size_are_those_of_what_is_covered():
    scene = dataclasses.replace(SCENE, behind="")
    video, cover = world.render(scene, 50, 12, 96, 160)
    factors = {n: [c.index(getattr(scene, n))] * 12 for n, c in reader.CLASSES.items()}
    found = reader.read(TrueReader(torch.from_numpy(cover), factors), video, batch=5)
    y, x = np.arange(96) + 0.5, np.arange(160) + 0.5
    total = cover.sum((1, 2))
    true = np.stack([(cover.sum(1) * x).sum(1) / 160, (cover.sum(2) * y).sum(1) / 96], 1) / total[:, None]
    assert np.abs(found.centre - true).max() < 0.01
    assert np.abs(found.area - total / (96 * 160)).max() < 0.005
    assert found.seen.all()
    assert found.most("pattern") == "striped"
    for t in range(12):
        rows, columns = np.flatnonzero(cover[t].max(1) > 0.5), np.flatnonzero(cover[t].max(0) > 0.5)
        edges = np.array([columns[0] / 160, rows[0] / 96, (columns[-1] + 1) / 160, (rows[-1] + 1) / 96])
        assert np.abs(found.box[t] - edges).max() < 0.06


def test_where_nothing_is_seen_there_is_no_place():
    video = np.zeros((3, 64, 96, 3), np.uint8)
    found = reader.read(TrueReader(torch.zeros(3, 64, 96), {n: [0] * 3 for n in reader.CLASSES}), video)
    assert np.isnan(found.centre).all()
    assert np.isnan(found.box).all()
    assert not found.seen.any()
    assert found.most("colour") == world.COLOURS[0]


def test_what_a_frame_does_not_show_is_not_asked_for():
    frames = np.arange(2000)
    away = world.away([SCENE] * 2000, frames)
    hidden, open_ = int(np.flatnonzero(away == 1)[0]), int(np.flatnonzero(away == 0)[40])
    for frame, unknown in ((hidden, {"subject", "colour", "pattern", "sky", "side"}), (open_, set())):
        cover = torch.from_numpy(world.render_frames([SCENE], [frame])[1][0])
        labels = dict(zip(reader.CLASSES, train_reader.labels_of(SCENE, frame, cover), strict=True))
        assert {n for n, label in labels.items() if label < 0} == unknown
        assert labels["land"] == world.LANDS.index("trees")


@pytest.mark.slow
def test_a_reader_is_trained(tmp_path, monkeypatch):
    """A few steps: the loss is finite, the state holds figures of true frames and of the VAE's."""
    monkeypatch.setattr(train_reader, "reader_figures", lambda *a: {"scenes": 0})
    monkeypatch.setattr(train_reader.PairPool, "renew", _renewed_once(train_reader.PairPool.renew))
    train_reader.train_reader(tmp_path, steps.Setting(rich=True), 0.05)
    saved = torch.load(tmp_path / "reader.pt", weights_only=True)
    assert set(saved["figures"]) == {"true", "vae"}
    reader.SceneReader().load_state_dict(saved["params"])
    assert all(torch.isfinite(v).all() for v in saved["params"].values())


def _renewed_once(renew):
    """Renders for the first eight calls only."""
    calls = []

    def few(pool):
        calls.append(1)
        if len(calls) <= 8:
            renew(pool)

    return few


def test_figures_of_a_reader_that_is_never_right_or_always(monkeypatch):
    """The shares are of clips in which the factor shows throughout."""
    setting = steps.Setting(rich=True)
    monkeypatch.setattr(
        reader,
        "read",
        lambda model, frames: reader.Reading(
            {n: np.zeros(17, np.int64) for n in reader.CLASSES},
            np.full(17, 0.05),
            np.full((17, 2), 0.5),
            np.zeros((17, 4)),
        ),
    )
    figures = train_reader.reader_figures(reader.SceneReader(), setting, None, num_scenes=60)
    assert figures["side"] == pytest.approx(0.5, abs=0.2)
    assert figures["colour"] == pytest.approx(0.2, abs=0.17)
    assert 5 < figures["centre_off"] < 40
