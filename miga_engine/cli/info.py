"""`miga info` and `miga convert`."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from miga_engine._version import __version__
from miga_engine.cli.settings import PLACES
from miga_engine.cli.terminal import say
from miga_engine.errors import CheckpointError, ConfigError, printable


def info(options: argparse.Namespace) -> int:
    """The command: versions, devices, kernels, and what a model, video or session is."""
    import torch

    from miga_engine import _extension
    from miga_engine.runtime.session import is_session, load_session
    from miga_engine.runtime.session_info import describe_session
    from miga_engine.video.outputs import has_metadata

    rows = [
        ("miga_engine", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("devices", ", ".join(_devices())),
        ("C++ kernels", _extension.status()),
        *_kernels(),
    ]
    if options.path and os.path.isfile(options.path) and has_metadata(options.path):
        from miga_engine.video.reading import read_metadata

        rows += [(key, value) for key, value in read_metadata(options.path).items()]
    elif options.path and options.path.endswith(".safetensors") and is_session(options.path):
        rows += describe_session(load_session(options.path))
    elif options.path and os.path.isfile(options.path):
        from miga_engine.models.inspecting import describe_file

        rows += describe_file(Path(options.path))
    elif options.path:
        from miga_engine.engine import Engine

        engine = Engine.from_pretrained(options.path, "cpu")
        rows += [(key, value) for key, value in engine.describe().items()]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{printable(key):<{width}}  {printable(value)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """The command: a weights file as safetensors."""
    import torch

    from miga_engine.config import LoadOptions
    from miga_engine.models import convert as conversion
    from miga_engine.models.loading import sources_of
    from miga_engine.options import picked
    from miga_engine.tiny import WEIGHTS_DIR
    from miga_engine.video.paths import check_output
    from miga_engine.weights.files import FORMATS

    given = vars(options)
    dtype = getattr(torch, given["dtype"]) if given.get("dtype") else None
    if Path(options.output).suffix.lower() in {suffix for form in FORMATS for suffix in form.suffixes}:
        if named := next((option for option in PLACES if given.get(option)), None):
            raise ConfigError(
                f"--{named.replace('_', '-')} is for a whole model, and {options.output} is one file: name a folder to "
                "write into"
            )
        target = check_output(options.output, (".safetensors",), overwrite=options.overwrite)
        source = Path(options.model)
        if not source.is_file():
            raise CheckpointError(
                f"{source} is not a file: give a weights file such as model.ckpt, or write a whole model into a folder"
            )
        num_tensors, num_bytes = conversion.convert(source, target, dtype)
    else:
        target = Path(options.output)
        asked = LoadOptions(**picked(given, LoadOptions) | {"dtype": None})
        sources = sources_of(asked, WEIGHTS_DIR if asked.model == "tiny" else None)
        num_tensors, num_bytes = conversion.convert_model(sources, target, dtype)
    say(f"{target}: {num_tensors} tensors, {num_bytes / 1e9:.2f} GB")
    return 0


def _kernels() -> list[tuple[str, str]]:
    """Who computes what on the default device, and why the others do not."""
    import torch

    from miga_engine import ops

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        triton = f"{version('triton')} (GPUs only)"
    except PackageNotFoundError:
        triton = "not installed: on a GPU the ops would run in eager PyTorch"
    backends = ops.attention_backends(device, dtype).items()
    return [("Triton kernels", triton), *((f"attention {name}", reason or "available") for name, reason in backends)]


def _devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*gpus, f"cpu ({torch.get_num_threads()} threads)"]
