"""Frames of two videos in one asyncio program, one of them changed on the way. `python examples/asyncio_stream.py`"""

import asyncio
from collections.abc import AsyncIterator

import torch

from miga_engine import Engine
from miga_engine.runtime.stream import Stream

engine = Engine.from_pretrained("tiny")


async def frames_of(stream: Stream) -> AsyncIterator[torch.Tensor]:
    """The frames of a stream, uint8 [H,W,3]; the event loop goes on while they are made."""
    while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
        for frame in chunk.frames:
            yield frame


async def show(name: str, stream: Stream, change_at: int | None = None) -> None:
    """Say how bright each second of a video is."""
    number = 0
    async for frame in frames_of(stream):
        if number == change_at:
            stream.set_prompt("a red balloon over snowy hills at night", above=0.6)
        if number % 12 == 0:
            print(f"{name}, frame {number}: {frame.float().mean():.0f}", flush=True)
        number += 1
    stream.close()


async def main() -> None:
    """Both at once."""
    prompts = ("a red balloon over snowy hills at noon", "a yellow kite over green hills at dusk")
    day, kite = (engine.stream(prompt, 73, miga={"warmup": "clip"}) for prompt in prompts)
    await asyncio.gather(show("balloon", day, change_at=12), show("kite", kite))


asyncio.run(main())
