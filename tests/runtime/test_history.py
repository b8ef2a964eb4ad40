"""Guidance on history: the unconditional branch reads noise in place of what a window has seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from miga_engine.runtime.network import Batch
from miga_engine.schedule import make_schedule
from tests.oracle import PlainNetwork, collect, pseudo_network, toy_config, toy_run

LEVELS = make_schedule("unipc", 16, 5.0).timesteps


class Watched(PlainNetwork):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__(pseudo_network)
        self.asked: list[Batch] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.asked.append(batch)
        return super().__call__(batch)


def watched(changed_at: int = 40, **options: object) -> list[Batch]:
    """What the network is asked in a run of 40 latent frames whose prompt changes at one of them."""
    run = toy_run(toy_config(**options), 40)
    run.prompt_row = lambda frame: 1 if frame < changed_at else 2
    run.denoiser.network = network = Watched()
    collect(run)
    return network.asked


@pytest.mark.parametrize("options", [
    {"history_guidance": "all", "commit_offset": -1, "zigzag_width": 1, "guidance_frames": 1, "guidance_anchor": True},
    {"history_guidance": "all", "commit": "trailing", "warmup": "copies", "zigzag_width": 1, "guidance_frames": 0},
    {"history_guidance": "distant", "commit_offset": 2, "guidance_anchor": True}, {"history_guidance": "distant"},
], ids=str)  # fmt: skip
def test_only_what_is_cleaner_of_the_same_prompt_and_before_is_changed_for_noise(options: dict[str, object]) -> None:
    batches = watched(changed_at=20, **options)
    parted = [batch for batch in batches if len(batch.latents) == len(batch.prompt_rows)]
    assert len(parted) > 50
    assert any(len(batch.prompt_rows.unique()) == 3 for batch in parted)
    blanks = []
    for batch in parted:
        (seen, blind), (level, told), (rows, none), keep = (
            x.chunk(2) for x in (batch.latents, batch.timesteps, batch.prompt_rows, batch.keep)
        )
        rows = rows.reshape(len(rows), -1).expand(level.shape)
        assert ((rows == 1) | (rows == 2)).all()
        assert (none == 0).all()
        assert torch.equal(*keep)
        first = keep[0][:, :1]
        bound = first if options["history_guidance"] == "all" else 2  # there are two guidance frames
        is_past = (torch.arange(level.shape[1]) < bound) & (level < level.gather(1, first))
        is_past &= rows == rows.gather(1, first)
        assert torch.equal(told, torch.where(is_past, LEVELS[0].float(), level))
        seen, blind = (x.transpose(1, 2) for x in (seen, blind))  # [B,F,C,H,W]
        assert torch.equal(seen[~is_past], blind[~is_past])
        for window, mask in zip(blind, is_past, strict=True):
            blanks.append(window[mask])
    drawn = torch.cat(blanks)  # [n,C,H,W], never twice the same
    assert len(drawn) > 100
    assert len(torch.unique(drawn.flatten(1), dim=0)) == len(drawn)
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.std()) - 1) < 0.05


def test_windows_at_one_level_have_no_history() -> None:
    """The seed clip and Stage 2: both branches read the same, once."""
    batches = watched(history_guidance="all", commit_offset=2)
    alike = [batch for batch in batches if len(batch.prompt_rows) == 2 * len(batch.latents)]
    assert any((batch.timesteps == LEVELS[-1]).all() for batch in alike)
    assert not any(
        (batch.timesteps == batch.timesteps[0, 0]).all() for batch in batches if all(batch is not x for x in alike)
    )


def test_without_guidance_it_changes_nothing_and_with_it_the_video() -> None:
    options = {"commit_offset": -1, "guidance_anchor": True}
    for scale, is_same in ((1.0, True), (None, True), (3.0, False)):
        without, with_it = (
            collect(toy_run(toy_config(history_guidance=choice, **options), 24, guidance_scale=scale))
            for choice in ("off", "distant")
        )
        assert torch.equal(without, with_it) == is_same


def test_windows_that_go_together_give_what_they_give_alone() -> None:
    options = {"history_guidance": "all", "commit_offset": -1, "guidance_anchor": True}
    alone, together = (collect(toy_run(toy_config(window_batch=n, **options), 40)) for n in (1, 4))
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
