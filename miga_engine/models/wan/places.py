"""Where the parts of a Wan model lie: in the folders of its makers, in a ComfyUI tree, or wherever they are named.

Looked for in this order: what is named for the part; the file names of the official and the Diffusers folder; then, in
a ComfyUI tree or a folder of its file names, whatever file's keys are those of the part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from miga_engine.errors import CheckpointError
from miga_engine.models.family import Sources
from miga_engine.models.wan import kinds, layouts
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import format_of, open_checkpoint, open_files
from miga_engine.weights.untrusted import read_json, short

OFFICIAL_PAIR = ("high_noise_model", "low_noise_model")
_PAIRS = (OFFICIAL_PAIR, ("transformer", "transformer_2"))
"""Folders of the two networks of Wan2.2 A14B, that for high noise first: official, and of Diffusers."""

# File names that hold a part, in the order in which they are looked for. Of several that match "any" the one counts
# whose keys are the part's; the others are one network in several files.
_DIFFUSION_FILES = ("diffusion_pytorch_model*.index.json", "diffusion_pytorch_model*.safetensors")
_NAMES = {
    "transformer": (*_DIFFUSION_FILES, "diffusion_pytorch_model*.bin", "model*.index.json", "model*.safetensors"),
    "vae": _DIFFUSION_FILES,
    "text_encoder": ("models_t5*.safetensors", "models_t5*.pth", "model*.index.json", "model*.safetensors"),
    "tae": (),
}
_ANY = {"transformer": (), "vae": ("*[vV][aA][eE]*",), "text_encoder": ("*[uU][mM][tT]5*",), "tae": ("*[tT][aA][eE]*",)}
_TOKENIZER_FILES = (
    "tokenizer/tokenizer.json",
    "google/*/tokenizer.json",
    "tokenizer.json",
    "tokenizer/spiece.model",
    "google/*/spiece.model",
    "spiece.model",
)
_OFFICIAL_FILES = ("diffusion_pytorch_model*", "*/diffusion_pytorch_model*", "models_t5*", "text_encoder/model*")
_COMFY_FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "tae": ("vae_approx",),
}
_MOST_FILES = 1000  # that are looked at in a tree

_WORDS = {"transformer": "transformer", "vae": "vae", "text_encoder": "text encoder", "tae": "TAEW2.1"}
_GIVE = "give an official or Diffusers Wan2.1 folder"
_REMEDIES = {
    "transformer": f"{_GIVE}, a ComfyUI folder, or the weights file itself",
    "vae": f"{_GIVE}, or name the weights file with --vae",
    "text_encoder": f"{_GIVE}, or name the weights file with --text-encoder",
    "tae": "download taew2_1.safetensors and name it with --vae",
}


def recognises(path: Path) -> bool:
    """Whether a folder has file names or files of Wan's, or a file the keys of one of its networks."""
    if path.is_file():
        return format_of(path) is not None and kinds.kind_of(open_checkpoint(path)) is not None
    if not path.is_dir():
        return False
    if any(any(path.glob(pattern)) for pattern in _OFFICIAL_FILES):
        return True
    return any(kind is not None for _, kind in _kinds(_around(path, "transformer")))


def files_of(sources: Sources, part: str) -> list[Path]:
    """The weights files of a part: "transformer", "vae", "text_encoder" or "tae". Raises CheckpointError."""
    given = sources.vae if part == "tae" else getattr(sources, part)
    path = sources.root if given is None else given
    if path.is_file():
        if given is not None or part == "transformer":
            return [path]
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a model folder or a weights file")
    folder = path / part if (path / part).is_dir() else path
    named = [file for pattern in _ANY[part] for file in sorted(folder.glob(pattern)) if format_of(file) is not None]
    if any(kind is not None and not kind.part for _, kind in _kinds(named)):  # a name that is another model's too
        named = [file for file, kind in _kinds(named) if kind is not None and kind.part == part]
    if len(named) == 1:
        return named
    for pattern in _NAMES[part]:
        files = sorted(folder.glob(pattern))
        if files and ((pattern.endswith(".json") and not named) or not _is_other(files, part, pattern)):
            return files
    return [_chosen(named or _around(path, part), part, folder, sources)]


def networks(sources: Sources) -> tuple[Sources, ...]:
    """Where the network of the transformer lies, or, of Wan2.2 A14B, that for high noise and that for low noise.

    Each with the LoRAs that are its own: those whose name says for which noise they are, and all others. Raises
    CheckpointError where one of two is not there.
    """
    if sources.transformer_2 is None:
        pair = _pair_at(sources.leading)
    else:
        inside = sources.leading / OFFICIAL_PAIR[0]
        pair = (inside if inside.is_dir() else sources.leading, sources.transformer_2)
        for path, noise in zip(pair, ("low", "high"), strict=True):
            if kinds.noise_of(path.name) == noise:
                raise CheckpointError(
                    f"{path} is by its name the network for {noise} noise: give that for high noise as the model or "
                    "with --transformer, and that for low noise with --transformer-2"
                )
    if pair is None:
        return (sources,)
    return tuple(
        dataclasses.replace(
            sources, transformer=path, transformer_2=None,
            loras=tuple(lora for lora in sources.loras if kinds.noise_of(lora[0].name) in ("", noise)),
        )
        for path, noise in zip(pair, ("high", "low"), strict=True)
    )  # fmt: skip


def boundary_ratio(folder: Path) -> float | None:
    """From which share of all timesteps on a Diffusers folder says that the network for high noise is meant; None where
    it says of no two networks. Raises CheckpointError."""
    index = folder / "model_index.json"
    ratio = read_json(index).get("boundary_ratio") if index.is_file() else None
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise CheckpointError(f"{index} says boundary_ratio {short(repr(ratio))}: give a number between 0 and 1")
    return ratio


def tokenizer_file(sources: Sources) -> Path:
    """A `tokenizer.json`, a `spiece.model`, or the file of the text encoder where that holds one of its own.

    Raises CheckpointError.
    """
    path = sources.tokenizer or sources.root
    if sources.tokenizer is not None and path.is_file():
        return path
    folder = path.parent if path.is_file() else path
    for pattern in _TOKENIZER_FILES:
        if files := sorted(folder.glob(pattern)):
            return files[0]
    if sources.tokenizer is None:
        for file in _text_encoders(sources):
            if has_vocabulary(open_checkpoint(file)):
                return file
    raise CheckpointError(
        f"{folder} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): "
        "download the tokenizer.json of google/umt5-xxl, and name it with --tokenizer where it lies elsewhere"
    )


def has_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether a file of the text encoder holds the tokenizer too."""
    return "tokenizer.ggml.tokens" in checkpoint.metadata or layouts.vocabulary(checkpoint) is not None


def refuse_described(folder: Path) -> None:
    """CheckpointError where the JSON files of a model's folder tell that it is another kind of model."""
    for config in (folder / name / "config.json" for name in ("", "transformer", *OFFICIAL_PAIR)):
        if config.is_file():
            layouts.refuse_types(config, read_json(config))


def _pair_at(path: Path) -> tuple[Path, Path] | None:
    """The networks for high and for low noise at or beside a path; None where it leads to one network for all."""
    folder, is_file = (path.parent, True) if path.is_file() else (path, False)
    for names in _PAIRS:
        if is_file and folder.name not in names:
            continue
        inside = folder.parent if folder.name in names else folder
        pair = (inside / names[0], inside / names[1])
        is_there = [part.is_dir() for part in pair]
        if all(is_there):
            return pair
        if any(is_there) and (names == OFFICIAL_PAIR or is_there[1] or boundary_ratio(inside) is not None):
            which = is_there.index(True)
            raise _alone(pair[which], ("high", "low")[which])
    if is_file:
        if not kinds.noise_of(path.name) or not _transformers([path]):  # what else it is its reader says
            return None
        files = [file for file in folder.iterdir() if kinds.stem_of(file.name) == kinds.stem_of(path.name)]
    elif not path.is_dir() or any(any(path.glob(name)) for name in (*_NAMES["transformer"], "transformer")):
        return None
    else:
        files = _around(path, "transformer")
    found = {file: kinds.noise_of(file.name) for file in _transformers(_weights_files(files))}
    if sorted(found.values()) == ["high", "low"]:
        high, low = sorted(found, key=found.__getitem__)
        return high, low
    if len(found) == 1 and (noise := next(iter(found.values()))):
        raise _alone(next(iter(found)), noise)
    return None


def _transformers(files: Sequence[Path]) -> list[Path]:
    return [file for file, kind in _kinds(files) if kind is not None and kind.part == "transformer"]


def _alone(path: Path, noise: str) -> CheckpointError:
    remedies = {
        "high": "give that for low noise with --transformer-2",
        "low": "give that for high noise as the model or with --transformer, and this one with --transformer-2",
    }
    return CheckpointError(
        f"{path} is one of the two networks of Wan2.2 T2V-A14B, that for {noise} noise, and the other is not beside "
        f"it: {remedies[noise]}"
    )


def _text_encoders(sources: Sources) -> list[Path]:
    try:
        return [file for file in files_of(sources, "text_encoder") if not file.name.endswith(".json")]
    except CheckpointError:  # named where it is loaded
        return []


def _latent_channels(sources: Sources) -> int:
    """Channels of the latents that the transformer takes; 0 where there is none."""
    try:
        kind = kinds.kind_of(open_files(files_of(networks(sources)[0], "transformer")))
    except CheckpointError:  # named where it is loaded
        return 0
    return 0 if kind is None else kind.channels


def _around(path: Path, part: str) -> list[Path]:
    """Weights files in the folders that ComfyUI has for a part, in the tree at or around a path; where it is no such
    tree, those of the folder itself."""
    trees = [path, path / "models"]
    trees += [parent.parent for parent in (path, *path.parents) if parent.name in _COMFY_FOLDERS["transformer"]][:1]
    for tree in trees:
        is_tree = any((tree / name).is_dir() for name in _COMFY_FOLDERS["transformer"])
        folders = [tree / name for name in _COMFY_FOLDERS[part] if is_tree and (tree / name).is_dir()]
        if folders:
            return _weights_files(file for folder in folders for file in folder.rglob("*"))
    return _weights_files(path.iterdir())


def _weights_files(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if format_of(file) is not None and file.is_file())[:_MOST_FILES]


def _kinds(files: Sequence[Path]) -> list[tuple[Path, kinds.Kind | None]]:
    """What each file is; those that cannot be read are nobody's."""
    found = []
    for file in files:
        try:
            found.append((file, kinds.kind_of(open_checkpoint(file))))
        except CheckpointError:
            found.append((file, None))
    return found


def _is_other(files: Sequence[Path], part: str, pattern: str) -> bool:
    """Whether files of a name that several parts may have are another one's; damaged ones are not."""
    found = {kind.part for _, kind in _kinds(files) if kind is not None}
    return part not in found and (pattern.startswith("model") or bool(found - {""}))


def _chosen(files: Sequence[Path], part: str, folder: Path, sources: Sources) -> Path:
    """The file that is the part: of several VAEs or text encoders the largest, which rounds least; of VAEs for several
    kinds of latents one for the transformer's."""
    known = _kinds(files)
    parts = {file: kind for file, kind in known if kind is not None and kind.part == part}
    fitting = list(parts)
    if part == "vae" and len({kind.channels for kind in parts.values()}) > 1:
        channels = _latent_channels(sources)
        fitting = [file for file, kind in parts.items() if kind.channels == channels] or fitting
    if not fitting:
        others = [f"{file.name} is {kind.name}" for file, kind in known if kind is not None and not kind.part]
        names = (*_NAMES[part], *_ANY[part])
        why = f"{others[0]}" if others and part != "tae" else f"none of {', '.join(names)}"
        raise CheckpointError(f"{folder} holds no {_WORDS[part]} weights ({why}): {_REMEDIES[part]}")
    if part == "transformer" and len(fitting) > 1:
        listed = ", ".join(file.name for file in fitting[:5]) + (", …" if len(fitting) > 5 else "")
        raise CheckpointError(
            f"{folder} holds {len(fitting)} text-to-video transformers ({listed}): name one with --transformer"
        )
    return max(fitting, key=lambda file: file.stat().st_size)
