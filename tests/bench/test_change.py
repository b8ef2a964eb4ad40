"""Where a video changes: what is followed is what the run predicts, and is placed between its ends."""

import pytest
import torch

from bench.study import change
from miga_engine import Engine


def test_places_are_those_between_two_pictures() -> None:
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])
    followed = torch.tensor([[[1.0, 5.0], [2.0, -7.0]], [[3.0, 0.0], [float("nan")] * 2]])
    found = change.places(followed, start, end)
    assert found[0].tolist() == [0, 0.5]
    assert found[1, 0] == 1
    assert found[1, 1] != found[1, 1]


@pytest.mark.slow
def test_every_step_of_every_frame_is_followed() -> None:
    engine = Engine.from_pretrained("tiny", "cpu")
    options = {"height": 32, "width": 48, "miga": {"self_reflection": False}}
    request = engine.resolve("a red balloon over green hills", num_frames=65, **options)
    followed = change.follow(engine, request)
    clean = torch.cat([part.latents for part in engine.start(request)])  # [N,C,H,W]
    assert followed.shape == (len(clean), 24, clean.shape[1] * clean.shape[2])
    torch.testing.assert_close(followed[:, -1], clean.mean(-1).flatten(1), atol=1e-5, rtol=1e-5)
    is_known = ~followed.isnan().any(-1)  # the seed clip's frames are noised again to steps 13 to 1
    assert is_known[13:].all()
    assert is_known[:13].sum(1).tolist() == [24 - step for step in range(13, 0, -1)]
