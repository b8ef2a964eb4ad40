"""A video while it is made, for those who watch and steer it: server-sent events, and a WebSocket for frames too."""

from __future__ import annotations

import asyncio
import contextlib
import json
import reprlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from torch import Tensor

from miga_engine.errors import MigaError
from miga_engine.integrations.server.asked import RequestError, read_json
from miga_engine.integrations.server.events import Listener, as_json
from miga_engine.integrations.server.guard import PROTOCOL
from miga_engine.integrations.server.job import Job
from miga_engine.integrations.server.jobs import Jobs
from miga_engine.video.png import encode_png

BEAT_SECONDS = 10.0
"""Between two signs of life where nothing happens."""
SEND_SECONDS = 30.0
"""For a listener to take what it is sent; one who does not is let go."""
FRAME_HEADER_BYTES = 8

_OF_CHANGE = ("prompt", "guidance_scale", "at", "blend", "above", "restart")


def change_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A change of a running video as `Job.steer` takes it; RequestError where it is none."""
    for name in given:
        if name not in _OF_CHANGE:
            raise RequestError(f"unknown field {reprlib.repr(name)}; the fields are {', '.join(_OF_CHANGE)}", 422)
    if ("prompt" in given) == ("guidance_scale" in given):
        raise RequestError('a change has either a "prompt" or a "guidance_scale": send one of the two')
    of_prompt = [name for name in ("blend", "above", "restart") if name in given]
    if "guidance_scale" in given and of_prompt:
        raise RequestError(f"{of_prompt[0]} is for a change of the prompt: leave it out")
    if not isinstance(given.get("restart", False), bool):
        raise RequestError(f"restart is {reprlib.repr(given['restart'])}: give true or false")
    return dict(given)


async def event_stream(job: Job, jobs: Jobs) -> AsyncIterator[str]:
    """Server-sent events of a job, from its beginning as far as that is remembered, until it has ended."""
    listener = job.hub.listen()
    try:
        while True:
            is_last = _is_over(job, jobs)
            events, _ = await listener.news(0 if is_last else BEAT_SECONDS)
            for event in events:
                yield f"event: {event['event']}\ndata: {as_json(event)}\n\n"
            if is_last:
                yield "event: end\ndata: {}\n\n"
                return
            if not events:
                yield ": still here\n\n"
    finally:
        job.hub.leave(listener)


async def serve(socket: Any, job: Job, jobs: Jobs) -> None:
    """A WebSocket: events as JSON texts, with `?frames=1` frames as well, each a PNG behind its number in eight bytes.

    It takes changes as `POST …/prompt` does, as JSON texts, and {"type": "cancel"}.
    """
    await socket.accept(PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None)
    listener = job.hub.listen(wants_frames=socket.query_params.get("frames") == "1")
    listening = asyncio.create_task(_listen(socket, job, jobs))
    try:
        await _tell(socket, job, jobs, listener, listening)
        await socket.close(1001 if jobs.is_stopping else 1000)
    except Exception:  # whatever a client does ends its own connection alone
        with contextlib.suppress(Exception):
            await asyncio.wait_for(socket.close(1011), SEND_SECONDS)
    finally:
        listening.cancel()
        job.hub.leave(listener)


async def _tell(socket: Any, job: Job, jobs: Jobs, listener: Listener, listening: asyncio.Task[None]) -> None:
    while not listening.done():
        is_last = _is_over(job, jobs)
        events, chunks = await listener.news(0 if is_last else BEAT_SECONDS)
        for event in events:
            await asyncio.wait_for(socket.send_text(as_json(event)), SEND_SECONDS)
        for first_frame, frames in chunks:
            for i in range(len(frames)):
                data = await asyncio.to_thread(_framed, first_frame + i, frames[i])
                await asyncio.wait_for(socket.send_bytes(data), SEND_SECONDS)
        if is_last:
            return


def _framed(number: int, frame: Tensor) -> bytes:
    return number.to_bytes(FRAME_HEADER_BYTES, "big") + encode_png(frame.cpu().numpy())


async def _listen(socket: Any, job: Job, jobs: Jobs) -> None:
    """Take what the client sends, until it leaves."""
    while (message := await socket.receive())["type"] == "websocket.receive":
        try:
            given = read_json((message.get("text") or "").encode())
            if given.pop("type", "change") == "cancel":
                await asyncio.to_thread(jobs.cancel, job)
            else:
                await asyncio.to_thread(job.steer, change_of(given))
        except MigaError as error:
            answer = {"event": "refused", "message": str(error)}
            await asyncio.wait_for(socket.send_text(json.dumps(answer)), SEND_SECONDS)


def _is_over(job: Job, jobs: Jobs) -> bool:
    return job.is_ended or jobs.is_stopping or job.record.is_deleted
