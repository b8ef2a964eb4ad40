"""`python examples/live_prompt.py`: a video directed while it runs; type a prompt and Enter, an empty line ends it.

Frames go to live.mp4, and all that was typed, with its moment, to live.session.safetensors: `miga replay
live.session.safetensors` makes the same video again, bit for bit.
"""

import sys
import threading

from miga_engine import Engine
from miga_engine.video.outputs import open_sink

engine = Engine.from_pretrained("tiny")
ended = threading.Event()
stream = engine.stream(
    "a red balloon over snowy hills at dawn",
    miga={"warmup": "clip"},  # its first frames come as soon as they are made
    is_cancelled=ended.is_set,
    on_event=lambda event: event.kind == "prompt" and print(f"from frame {event.data['frame']}", file=sys.stderr),
)


def listen() -> None:
    """Hand over what is typed, from a thread of its own."""
    for line in sys.stdin:
        if not line.strip():
            break
        stream.set_prompt(line.strip(), blend=12)
    ended.set()


request = stream.request
with stream, open_sink("live.mp4", request.fps, request.width, request.height, overwrite=True) as sink:
    threading.Thread(target=listen, daemon=True).start()
    for chunk in stream:
        sink.write(chunk.frames)
    stream.save("live.session.safetensors")
