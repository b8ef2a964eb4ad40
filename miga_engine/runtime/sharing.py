"""Several videos on one network: batches of windows that are there at one time go through it together.

The network of such a run, a `SharedTransformer`, hands each batch to the one thread of a `Sharing` and waits for its
output. That thread computes what fits together, in the order in which it came: windows of one size in as many guidance
branches, of one schedule and one expert. Before that it waits for runs that it served just now and that are on the way
to their next batch, but not for one that decodes, has given out a frame, is interrupted, over or closed, and for
PATIENCE at most.

No thread holds a lock while it waits for another. All that the thread is told goes through one queue, in order, and
what a signal raises reaches callers alone, never the one that computes for all.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from miga_engine.device import current_device, is_out_of_memory, own_modes
from miga_engine.errors import ConfigError, MigaError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.protocols import StreamDecoder, TextTable
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.joining import Texts, joined, same_levels, split
from miga_engine.runtime.network import Batch, PromptedTransformer, forward
from miga_engine.runtime.pump import Pump
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.stream import Stream, _Cut

_log = logging.getLogger("miga_engine")

PATIENCE = 0.5
"""Share of the newest forward's time for which batches wait for a run that was served and is silent since."""
FIRST_PATIENCE_S = 0.05


class _Member:
    """One run among those that share; what its batches must agree in with others."""

    def __init__(self) -> None:
        self.attention: dict[str, str] = {}
        self.levels: Any = None
        self.kind: tuple[Any, ...] = ()
        """Of its newest batch."""


class _Call:
    """A batch that waits for its output; `answer` gets (output, None) or (None, error) once."""

    def __init__(self, member: _Member, batch: Batch) -> None:
        self.member, self.batch = member, batch
        self.num_branches = len(batch.prompt_rows) // len(batch.latents)
        self.kind = (*batch.latents.shape[1:], self.num_branches, batch.expert, id(member.levels))
        self.came = time.monotonic()
        self.answer: queue.SimpleQueue[tuple[Tensor | None, BaseException | None]] = queue.SimpleQueue()


class Sharing:
    """Where the batches of several runs of one model meet; at most `most_windows` windows go together.

    Its thread is there as long as a run is. Texts of all runs are rows of one table, which is made anew, for as many
    rows as they need and the keys of the longest, when a run begins and when half of it has no owner any more.
    """

    def __init__(self, bundle: ModelBundle, most_windows: int) -> None:
        if isinstance(most_windows, bool) or not isinstance(most_windows, int) or most_windows < 1:
            raise ConfigError(f"most_windows is {most_windows!r}: give a whole number of windows, 1 or more")
        self.most_windows = most_windows
        self.num_forwards = 0
        self.lock = threading.RLock()
        """Of the network and the texts: whoever has it encodes, writes or computes, and waits for nobody."""
        self._transformer, self._dtype, self._device = bundle.transformer, bundle.dtype, bundle.device
        self._texts = Texts()
        self._thread: threading.Thread | None = None
        # The rest belongs to the thread.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: list[_Call] = []
        self._served: set[_Member] = set()  # and silent since
        self._free_since = 0.0
        self._patience = FIRST_PATIENCE_S

    # What runs say, in any thread ------------------------------------------------------------------------------------

    def seat(self, member: _Member, like: TextTable, num_rows: int, num_keys: int) -> None:
        """Give a member rows for so many texts of the kinds of this one, in place of those that it had."""
        with self.lock, self.ordered():
            self._texts = self._texts.seated(member, like, num_rows, num_keys)
            with uninterrupted():
                if self._thread is None:
                    # A daemon, and ended before the interpreter is: see `decode.Decoding`.
                    self._thread = threading.Thread(target=self._run, name="miga-sharing", daemon=True)
                    try:
                        self._thread.start()
                    except BaseException:
                        self._thread = None
                        raise
                    atexit.register(self._stop)

    def write(self, member: _Member, row: int, prompt: TextTable) -> None:
        """Make a text this row of a member's."""
        with self.lock, self.ordered():
            if member not in self._texts.places:
                raise _asked_too_late()
            self._texts.write(member, row, prompt)

    def known_levels(self, levels: Any) -> Any:
        """These noise levels, or those of a member that are the same: who has the same goes together."""
        with self.lock:
            members = self._texts.places
            return next((member.levels for member in members if same_levels(member.levels, levels)), levels)

    def output(self, member: _Member, batch: Batch) -> Tensor:
        """The network's output of a batch, or its error as the batch alone would have had it."""
        if member not in self._texts.places:
            raise _asked_too_late()
        call, mine = _Call(member, batch), self._other_stream()
        if mine is not None:
            shared = torch.cuda.default_stream(self._device)
            shared.wait_stream(mine)
            for tensor in (batch.latents, batch.timesteps, batch.steps, batch.prompt_rows, batch.keep):
                tensor.record_stream(shared)
        self._inbox.put(functools.partial(self._take, call))
        try:
            output, error = call.answer.get()
        except BaseException:
            self._inbox.put(functools.partial(self._withdraw, call))
            raise
        if error is not None:
            try:
                raise error
            finally:
                del error  # which holds this frame
        assert output is not None
        if mine is not None:
            mine.wait_stream(torch.cuda.default_stream(self._device))
            output.record_stream(mine)
        return output

    def pause(self, member: _Member) -> None:
        """The member's next batch is not to be waited for."""
        self._inbox.put(functools.partial(self._expect_no_more, member))

    def leave(self, member: _Member) -> None:
        """The member has no batches any more. Called by the garbage collector too, wherever that finds a thread."""
        self._inbox.put(functools.partial(self._forget, member))

    def ordered(self) -> AbstractContextManager[object]:
        """Within, work on a GPU goes to the default CUDA stream, as the thread's does, in order with the caller's."""
        mine = self._other_stream()
        return contextlib.nullcontext() if mine is None else _on_default_stream(mine)

    def _other_stream(self) -> Any:
        """The caller's CUDA stream where it is not the default one."""
        if self._device.type != "cuda":
            return None
        mine = torch.cuda.current_stream(self._device)
        return None if mine == torch.cuda.default_stream(self._device) else mine

    # The thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        # OpenMP counts threads by thread; asking makes torch set this one's count to the process's.
        torch.get_num_threads()
        while self._thread is threading.current_thread():
            try:
                news = self._next()
            except queue.Empty:
                self._compute_next()
            else:
                news()
                del news  # with its batch

    def _next(self) -> Callable[[], None]:
        """What was told next; queue.Empty where it is time to compute.

        Python 3.10 waits for ever for something that is not there, if `get` is its first look and its time runs out
        meanwhile: the first look takes no time.
        """
        with contextlib.suppress(queue.Empty):
            return self._inbox.get_nowait()
        if (seconds := self._seconds_to_wait()) == 0:
            raise queue.Empty
        return self._inbox.get(timeout=seconds)

    def _take(self, call: _Call) -> None:
        call.member.kind = call.kind
        self._served.discard(call.member)
        self._waiting.append(call)

    def _expect_no_more(self, member: _Member) -> None:
        self._served.discard(member)

    def _withdraw(self, call: _Call) -> None:
        self._served.discard(call.member)
        self._waiting = [other for other in self._waiting if other is not call]

    def _forget(self, member: _Member) -> None:
        """Give back what a member has, and end with the last of them."""
        self._served.discard(member)
        for call in [call for call in self._waiting if call.member is member]:
            self._withdraw(call)
            call.answer.put((None, _asked_too_late()))
        with self.lock, self.ordered():
            self._texts = self._texts.without(member)
            if not self._texts.places:
                self._thread = None
                atexit.unregister(self._stop)
            with contextlib.suppress(RuntimeError, MemoryError):  # two tables at once are too much: it stays large
                self._texts = self._texts.packed()

    def _stop(self) -> None:
        """At the end of the program."""
        thread = self._thread
        self._inbox.put(functools.partial(setattr, self, "_thread", None))
        if thread is not None:
            thread.join()

    def _seconds_to_wait(self) -> float | None:
        """Until the oldest batch is computed with what is there then; None where there is none."""
        if not self._waiting:
            return None
        oldest = self._waiting[0]
        if self._is_full(oldest.kind) or not any(member.kind == oldest.kind for member in self._served):
            return 0.0
        return max(0.0, max(oldest.came, self._free_since) + self._patience - time.monotonic())

    def _is_full(self, kind: tuple[Any, ...]) -> bool:
        return sum(len(call.batch.latents) for call in self._waiting if call.kind == kind) >= self.most_windows

    def _compute_next(self) -> None:
        """Compute the oldest batch with those that fit; a run that was waited for in vain is not waited for again."""
        if not self._is_full(kind := self._waiting[0].kind):
            self._served -= {member for member in self._served if member.kind == kind}
        calls: list[_Call] = []
        num_windows, attention = 0, dict[str, str]()
        for call in self._waiting:
            count, chosen = len(call.batch.latents), call.member.attention
            fits = not calls or num_windows + count <= self.most_windows
            if fits and call.kind == kind and _agree(attention, chosen):
                calls.append(call)
                num_windows, attention = num_windows + count, attention | chosen
        self._waiting = [call for call in self._waiting if call not in calls]
        self._compute(calls)

    def _compute(self, calls: Sequence[_Call]) -> None:
        """Answer these batches; together, or each alone where that fails."""
        started, outputs, failure, is_short = time.monotonic(), None, None, False
        try:
            outputs = self._outputs(calls)
        except BaseException as error:  # nobody is to wait for ever
            failure, is_short = error if len(calls) == 1 else None, is_out_of_memory(error)
        # The error's traceback, which held the forward's tensors, is gone here if several share it.
        self._free_since = time.monotonic()
        self._patience = PATIENCE * (self._free_since - started)
        if outputs is not None:
            self._served.update(call.member for call in calls)
            for call, output in zip(calls, outputs, strict=True):
                call.answer.put((output, None))
        elif failure is not None:
            self._served.add(calls[0].member)
            calls[0].answer.put((None, failure))
            del failure
        else:
            if is_short:
                self._shrink(sum(len(call.batch.latents) for call in calls))
            for call in calls:
                self._compute([call])

    def _shrink(self, too_many: int) -> None:
        """Fewer windows together from now on than did not fit."""
        while self.most_windows >= too_many:
            self.most_windows //= 2
        _log.warning(
            "out of memory with %d windows of several streams: at most %d go together now", too_many, self.most_windows
        )
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # each batch alone will tell
                torch.cuda.empty_cache()

    def _outputs(self, calls: Sequence[_Call]) -> list[Tensor]:
        """The output of each batch, of one forward of all."""
        with self.lock, own_modes(), current_device(self._device):
            texts = self._texts
            batches = [call.batch for call in calls]
            attention = {kind: backend for call in calls for kind, backend in call.member.attention.items()}
            batch = joined(batches, [texts.places[call.member].first for call in calls])
            output = forward(self._transformer, self._dtype, batch, calls[0].member.levels, texts.table, attention)
            self.num_forwards += 1
            for call in calls:
                call.member.attention.update(attention)
            return split(output, batches)


class _Seat:
    """A member's rows as the `TextTable` that it writes to."""

    def __init__(self, sharing: Sharing, member: _Member) -> None:
        self._sharing, self._member = sharing, member

    def write(self, row: int, prompt: Any) -> None:
        self._sharing.write(self._member, row, prompt)


class SharedTransformer(PromptedTransformer):
    """The `WindowNetwork` of a run among others that share the network; see `PromptedTransformer`."""

    def __init__(self, sharing: Sharing, *given: Any) -> None:
        self.sharing, self.member = sharing, _Member()
        weakref.finalize(self, sharing.leave, self.member).atexit = False
        with sharing.lock, sharing.ordered():
            super().__init__(*given)
            self.member.attention = self._attention
            self.member.levels = self._levels = sharing.known_levels(self._levels)

    def prepare(self, expert: int, /) -> None:
        """Left to the thread that computes."""

    def __call__(self, batch: Batch, /) -> Tensor:
        return self.sharing.output(self.member, batch)

    def _table(self, prompt: TextTable, num_keys: int) -> Any:
        self.sharing.seat(self.member, prompt, self._num_slots, num_keys)
        return _Seat(self.sharing, self.member)

    def _encode(self, prompt_row: int) -> Any:
        with self.sharing.lock, self.sharing.ordered():
            return super()._encode(prompt_row)


class SharedStream(Stream):
    """A stream of a run whose network is shared: the others hear when it is busy with something else, or over."""

    def __init__(
        self, run: VideoRun, decoder: StreamDecoder, *given: Any, overlap_decode: bool, **options: Any
    ) -> None:
        network = run.denoiser.network
        assert isinstance(network, SharedTransformer)
        self._pause = functools.partial(network.sharing.pause, network.member)
        self._leave = functools.partial(network.sharing.leave, network.member)
        told = decoder if overlap_decode else _Pausing(decoder, self._pause)
        super().__init__(run, told, *given, overlap_decode=overlap_decode, **options)

    def close(self) -> None:
        """See `Stream.close`."""
        super().close()
        if self._pump is None:
            self._leave()

    def _give(self, cut: _Cut) -> None:
        super()._give(cut)
        self._pause()

    def _end(self, pump: Pump) -> None:
        self._leave()
        super()._end(pump)


class _Pausing:
    """A decoder in the thread of its run, which asks the network for nothing meanwhile."""

    def __init__(self, decoder: StreamDecoder, pause: Callable[[], None]) -> None:
        self._decoder, self._pause = decoder, pause
        self.state, self.load_state = decoder.state, decoder.load_state

    def push(self, latents: Tensor, /) -> Tensor:
        self._pause()
        return self._decoder.push(latents)


def _asked_too_late() -> MigaError:
    return MigaError("the network of a stream that is over was asked once more: begin or resume another")


def _agree(one: dict[str, str], other: dict[str, str]) -> bool:
    return all(one[kind] == backend for kind, backend in other.items() if kind in one)


@contextlib.contextmanager
def _on_default_stream(mine: torch.cuda.Stream) -> Iterator[None]:
    shared = torch.cuda.default_stream(mine.device)
    shared.wait_stream(mine)
    with torch.cuda.stream(shared):
        yield
    mine.wait_stream(shared)
