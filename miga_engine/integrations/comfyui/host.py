"""What ComfyUI is to its nodes: lists of files, an output folder, a progress bar, an interruption, managed memory.

Its modules are looked for when they are needed, so that all of this loads without it.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.runtime.session import SUFFIX
from miga_engine.runtime.stream import Event, Stream

_PREVIEW_PIXELS = 512  # of the longer side
_PREVIEW_SHARE = 0.1  # of the time, at most, that pictures of what is to come may take


class InterruptedByUser(BaseException):
    """Raised within a pass: like KeyboardInterrupt it leaves the stream one that can be saved and gone on with."""


class Comfy:
    """The ComfyUI of this process, for the node that is being run."""

    def __init__(self, node_id: Any = None) -> None:
        self.node_id = node_id

    @property
    def _paths(self) -> Any:
        return importlib.import_module("folder_paths")

    @property
    def _memory(self) -> Any:
        return importlib.import_module("comfy.model_management")

    # Files -------------------------------------------------------------------------------------------------------

    def files(self, folders: Iterable[str]) -> list[str]:
        """Names in ComfyUI's lists, with the GGUF files that lie in the same folders."""
        found: list[str] = []
        for folder in folders:
            if folder == "sessions":
                found += self.sessions()
            elif folder in self._paths.folder_names_and_paths:
                found += self._paths.get_filename_list(folder)
                for root in self._paths.get_folder_paths(folder):
                    found += [str(path.relative_to(root)) for path in sorted(Path(root).rglob("*.gguf"))]
        return list(dict.fromkeys(found))

    def path_of(self, folders: Iterable[str], name: str) -> str:
        """Where a file of such a list lies; ConfigError where it is in none."""
        for folder in folders:
            if folder in self._paths.folder_names_and_paths:
                for root in self._paths.get_folder_paths(folder):
                    path = os.path.abspath(os.path.join(root, name))
                    if os.path.isfile(path) and os.path.commonpath((path, os.path.abspath(root))) == os.path.abspath(
                        root
                    ):
                        return path
        raise ConfigError(f"{name!r} is in none of ComfyUI's folders {', '.join(folders)}: choose a file that is there")

    @property
    def output_folder(self) -> Path:
        """Where ComfyUI's files go."""
        return Path(self._paths.get_output_directory())

    def sessions(self) -> list[str]:
        """Session files in the output folder, relative to it, the newest first."""
        found = [path for path in self.output_folder.rglob(f"*{SUFFIX}") if not path.name.startswith(".")]
        found = [path for path in found if path.name.endswith(f".session{SUFFIX}")]
        newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.relative_to(self.output_folder).as_posix() for path in newest]

    def session_path(self, name: str) -> Path:
        """A session file by its name in the output folder, out of which no name leads; ConfigError."""
        path = (self.output_folder / name).resolve()
        if not path.is_relative_to(self.output_folder.resolve()) or not path.is_file():
            raise ConfigError(f"session {name!r} is not in ComfyUI's output folder: choose one of the list")
        return path

    def new_file(self, prefix: str, suffix: str, width: int, height: int) -> Path:
        """A name in the output folder that nothing has, as ComfyUI counts them; ConfigError for one outside it."""
        try:
            folder, name, count, _, _ = self._paths.get_save_image_path(
                prefix, self._paths.get_output_directory(), width, height
            )
        except Exception as error:  # ComfyUI's own, of no kind
            raise ConfigError(
                f"filename_prefix is {prefix!r}, and leads out of ComfyUI's output folder: name one in it"
            ) from error
        return Path(folder) / f"{name}_{count:05}_{suffix}"

    def shown(self, path: Path) -> dict[str, Any]:
        """What the screen is told of a video that was written."""
        below = path.relative_to(self.output_folder)
        subfolder = "" if below.parent == Path() else below.parent.as_posix()
        return {"images": [{"filename": below.name, "subfolder": subfolder, "type": "output"}], "animated": (True,)}

    def video(self, path: Path) -> Any:
        """A file as ComfyUI's type VIDEO."""
        return importlib.import_module("comfy_api.input_impl").VideoFromFile(str(path))

    # While a node runs -------------------------------------------------------------------------------------------

    def is_interrupted(self) -> bool:
        """Whether the user has asked for an end."""
        return bool(self._memory.processing_interrupted())

    def end_if_interrupted(self) -> None:
        """Raise what ends a node as interrupted, where the user has asked for it."""
        self._memory.throw_exception_if_processing_interrupted()

    @contextmanager
    def interruptible(self, is_within_passes: bool = True) -> Iterator[None]:
        """Within the block an interruption ends this thread's work at its next layer, by InterruptedByUser.

        Not `is_within_passes` where the network is compiled: hooks would be part of what is compiled.
        """
        thread, is_told = threading.get_ident(), False

        def look(module: object, given: object) -> None:
            nonlocal is_told  # once: what was made is decoded and saved behind it
            if not is_told and threading.get_ident() == thread and self.is_interrupted():
                is_told = True
                raise InterruptedByUser

        hook = torch.nn.modules.module.register_module_forward_pre_hook(look) if is_within_passes else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def progress(self, num_frames: int | None) -> Progress:
        """A bar of the node, for a video of so many frames."""
        bar = importlib.import_module("comfy.utils").ProgressBar(1, node_id=self.node_id)
        return Progress(bar.update_absolute, num_frames)

    # Memory ------------------------------------------------------------------------------------------------------

    def device(self) -> str:
        """Where ComfyUI computes."""
        return str(self._memory.get_torch_device())

    def free_bytes(self) -> int:
        """Of the machine's memory, what is free."""
        return int(self._memory.get_free_memory(torch.device("cpu")))

    def make_room(self, size: int, device: str) -> None:
        """Have ComfyUI unload models until so many bytes are free on a GPU."""
        self._memory.free_memory(size, torch.device(device))

    def hold(self, model: Managed, size: int = 0) -> None:
        """Have ComfyUI count a model among those it unloads, and make room for it and for `size` bytes of work."""
        self._memory.load_models_gpu([model], memory_required=size)


class Progress:
    """Tells a progress bar of a stream's passes and frames, with a picture of the frame that comes next."""

    def __init__(self, update: Callable[..., None], num_frames: int | None) -> None:
        self._update, self._num_frames = update, num_frames
        self._passes = self._num_passes = self._num_out = 0
        self._shown_at = self._took = 0.0

    def on_event(self, event: Event, stream: Stream | None) -> None:
        """An event of the stream; those that are no progress are none of ours."""
        if event.kind != "progress":
            return
        self._num_passes = max(event.data["passes_to_first_frame"], self._num_passes)
        self._passes = min(event.data["passes"], self._num_passes)
        self._num_out = event.data["num_frames_out"]
        picture = None
        started = time.perf_counter()
        if stream is not None and started - self._shown_at > self._took / _PREVIEW_SHARE:
            picture = stream.preview()
            self._shown_at = time.perf_counter()
            self._took = self._shown_at - started
        self._tell(picture)

    def frames(self, frames: torch.Tensor, num_out: int) -> None:
        """Frames uint8 `[n,H,W,3]` have left the stream, which has given so many now."""
        self._num_out = num_out
        self._shown_at = time.perf_counter()
        self._tell(frames[-1])

    def _tell(self, picture: torch.Tensor | None) -> None:
        done = self._passes + self._num_out
        total = done + 1 if self._num_frames is None else self._num_passes + self._num_frames
        shown = None
        if picture is not None:
            from PIL import Image  # ComfyUI's own

            shown = ("JPEG", Image.fromarray(picture.cpu().numpy()), _PREVIEW_PIXELS)
        self._update(done, total, shown)


class Managed:
    """A loaded engine as ComfyUI's manager of memory sees it: a model that can be unloaded, whole, and comes back.

    It is the value of the type MIGA_ENGINE. The networks are read again by the next run.
    """

    parent = None

    def __init__(self, engine: Engine, is_compiled: bool = False) -> None:
        self.model = engine
        self.is_compiled = is_compiled
        self.load_device = engine.device
        self.offload_device = torch.device("cpu")
        self._size = engine.network_bytes()

    @property
    def engine(self) -> Engine:
        """What makes videos."""
        return self.model

    def model_size(self) -> int:
        """Bytes of the weights when they are there."""
        self._size = max(self._size, self.model.network_bytes())
        return self._size

    def loaded_size(self) -> int:
        """Bytes of the weights now."""
        return self.model.network_bytes()

    def current_loaded_device(self) -> torch.device:
        """Where the weights are: away, they are nowhere but in their files."""
        return self.load_device if self.model.is_loaded else self.offload_device

    def model_dtype(self) -> None:
        """None: no dtype is to be changed."""

    def model_patches_to(self, where: object) -> None:
        """Nothing is patched."""

    def model_patches_models(self) -> list[Any]:
        """Nothing else comes with it."""
        return []

    def lowvram_patch_counter(self) -> int:
        """Nothing is patched."""
        return 0

    def is_clone(self, other: object) -> bool:
        """Whether another holds the same engine."""
        return getattr(other, "model", None) is self.model

    def partially_load(self, device: object, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """The run that follows reads what is not there; bytes loaded here."""
        return 0

    def partially_unload(self, device: object, memory_to_free: float = 0) -> int:
        """Weights go together or not at all: `detach`."""
        return 0

    def detach(self, unpatch_all: bool = True) -> Engine:
        """Give the memory back. ComfyUI says False where another of its entries takes this one's place."""
        if unpatch_all:
            self.model.unload()
        return self.model
