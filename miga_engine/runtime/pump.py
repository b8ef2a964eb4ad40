"""What drives a run: ticks it, decodes what becomes clean, and holds the frames until they are given out."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miga_engine.device import is_out_of_memory
from miga_engine.errors import DeviceError, NumericsError, SessionError
from miga_engine.models.protocols import StreamDecoder
from miga_engine.runtime.decode import Decoding, on_side_stream
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.stages import DONE, VideoRun
from miga_engine.runtime.steering import Ask, Steering


class Pump:
    """A run with its decoder, for one thread at a time; `advance` makes frames until it `is_over`.

    An error is kept as `failure`, so that the frames made before it come first. An interrupt changes nothing: whatever
    is called next goes on. `is_cancelled` is asked between ticks; `num_video_frames` says how many frames a number of
    latent frames decodes to. `steering`, and what it is asked for, `asks`, come between ticks.
    """

    def __init__(
        self,
        run: VideoRun,
        decoder: StreamDecoder,
        *,
        overlap: bool,
        is_cancelled: Callable[[], bool],
        num_video_frames: Callable[[int], int],
        steering: Steering,
    ) -> None:
        self.run = run
        self.steering = steering
        self.asks: deque[Ask] = deque()
        """What any thread may add to."""
        self._heard: deque[Ask] = deque()  # of these, what all ranks know
        self.too_late: deque[Ask] = deque()
        """What was asked for when every frame that could take it was made."""
        self.is_over = False
        self.failure: Exception | None = None
        self._decoder = decoder
        self._decoding = Decoding(decoder.push, overlap=overlap, state=decoder.state, load_state=decoder.load_state)
        self.ready = self._decoding.ready
        """Frames that were decoded and not given out, group by group."""
        self._backlog: deque[Tensor] = deque()  # clean latents, not handed to the decoder yet
        self._num_latents = 0  # taken from the run
        self._is_cancelled = is_cancelled
        self._num_video_frames = num_video_frames

    def advance(self, before_parting: Callable[[], None]) -> None:
        """One tick, or at the end the frames still being decoded; an error is kept until the frames before are out.

        `before_parting` is called before the first tick that a longer run would do otherwise.
        """
        try:
            self._decode()  # what an interrupt left
            if self.run.stage == DONE or self._hear():
                self._decoding.settle(0)
                self.is_over = True
                return
            self._steer()
            if self.run.parts_next:
                before_parting()
            with torch.no_grad():
                self.run.tick()
            self._decode()
        except Exception as error:
            self.fail(error)
            self._drain()

    def fail(self, error: Exception) -> None:
        """The run is over, and ends with this error if with no earlier one."""
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # the tensors there: memory for what goes on from here
            error = DeviceError(
                "out of memory while decoding or between two passes: free memory and go on from here, or begin anew in "
                "bfloat16 (vae_dtype)"
            ).with_traceback(error.__traceback__)
        with uninterrupted():
            self.failure, self.is_over = self.failure or error, True

    @property
    def is_writer(self) -> bool:
        """Whether this process is the one, of those that share the run, that gives frames and saves."""
        ranks = self.run.denoiser.ranks
        return ranks is None or ranks.rank == 0

    def close(self) -> None:
        """End the decoder's thread."""
        self._decoding.close()

    def settle(self) -> bool:
        """Bring all that was made to where `state` finds it; whether this process is the one that saves.

        SessionError where a change of the run was broken off.
        """
        store = self.run.store
        if store.is_intact:
            with contextlib.suppress(NumericsError):  # of a pass that an interrupt kept from being looked at
                self.run.denoiser.check_finite()
        if not store.is_intact:
            raise SessionError(
                "the run stopped in the middle of an update and cannot be saved: the last session file stands"
            )
        if self.is_writer:
            self._take_clean()
            self._drain()
        return self.is_writer

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors on the CPU, numbers of the run) that what comes next depends on, with the frames not given out."""
        tensors, numbers = self.run.state()
        parts = {f"run/{name}": tensor for name, tensor in tensors.items()}
        parts |= {f"decoder/{name}": tensor.cpu() for name, tensor in self._decoder.state().items()}
        undecoded = [*self._decoding.undecoded, *self._backlog]
        if undecoded:
            parts["undecoded"] = torch.cat(undecoded).cpu()
        if self.ready:
            parts["frames"] = torch.cat(list(self.ready)).cpu()
        return parts, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go on from `state` of a run made alike; SessionError where the decoder's does not fit."""
        device = self.run.store.device

        def part(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

        self.run.load_state(part("run/"), numbers)
        self.steering.load()
        self._num_latents = self.run.emitted
        num_decoded = numbers["emitted"] - len(tensors.get("undecoded", ()))
        self._load_decoder(part("decoder/"), is_first=num_decoded == 0)
        if "undecoded" in tensors:
            self._backlog.append(tensors["undecoded"].to(device))
        if "frames" in tensors:
            self.ready.append(tensors["frames"].to(device))

    def _load_decoder(self, state: dict[str, Tensor], *, is_first: bool) -> None:
        """The decoder's memory, tried on a latent frame: to see that it fits, and gives the frames that come next."""
        store, num_expected = self.run.store, self._num_video_frames(1 if is_first else 2) - (0 if is_first else 1)
        with torch.no_grad(), on_side_stream(store.device):
            self._decoder.load_state(state)
            latent = torch.zeros(1, *store.frame_shape, device=store.device)
            num_frames = self._decoder.push(latent.unsqueeze(2)).shape[2]
            self._decoder.load_state(state)
        if num_frames != num_expected:
            raise SessionError("the saved decoder has seen other frames than the saved run: resume from another copy")

    def _hear(self) -> bool:
        """Make known to all ranks what rank 0 was asked for; whether it was asked to stop."""
        ranks, is_cancelled, asks = self.run.denoiser.ranks, self._is_cancelled(), list(self.asks)
        if ranks is not None:
            is_cancelled, asks = ranks.agree((is_cancelled, asks))
        with uninterrupted():
            self._heard.extend(asks)
            for _ in asks if self.is_writer else ():
                self.asks.popleft()
        return is_cancelled

    def _steer(self) -> None:
        """Let the run take up what it is told, if it stands between two ticks."""
        if not self.run.is_between_ticks:
            return
        while self.steering.due():
            pass
        while self._heard:
            if not self.steering.ask(ask := self._heard[0], then=self._heard.popleft):
                self.too_late.append(ask)

    def _decode(self) -> None:
        """Hand over what became clean, and take what came out of the decoder."""
        self._take_clean()
        while self._backlog:
            with uninterrupted():
                self._decoding.put(self._backlog.popleft())
            self._decoding.settle()
        self._decoding.settle()

    def _take_clean(self) -> None:
        clean = self.run.newest
        if clean is not None and clean.first_frame >= self._num_latents and self.is_writer:
            with uninterrupted():
                self._num_latents = clean.first_frame + len(clean.latents)
                self._backlog.append(clean.latents)

    def _drain(self) -> None:
        """Wait for the frames still being decoded; what cannot be decoded stays latent."""
        try:
            self._decoding.settle(0)
        except Exception as error:
            self.fail(error)
