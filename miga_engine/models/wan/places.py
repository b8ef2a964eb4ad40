"""Where the parts of a Wan model lie: in the folders of its makers, in a ComfyUI tree, or wherever they are named.

Looked for in this order: what is named for the part; the file names of the official and the Diffusers folder; then, in
a ComfyUI tree or a folder of its file names, whatever file's keys are those of the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from miga_engine.errors import CheckpointError
from miga_engine.models.family import Sources
from miga_engine.models.wan import kinds, layouts
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import format_of, open_checkpoint, open_files
from miga_engine.weights.untrusted import read_json

_EXPERTS = ("high_noise_model", "low_noise_model")  # folders of the two networks of Wan2.2 A14B

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
    if given is None and part == "transformer":
        refuse_experts(sources.root)
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


def refuse_experts(path: Path) -> None:
    """CheckpointError where the path leads to two networks that share a schedule, or to one of the two."""
    root = path.parent if path.is_file() else path
    inside = root.parent if root.name in (*_EXPERTS, "transformer", "transformer_2") else root
    index = inside / "model_index.json"
    is_pair = inside.joinpath("transformer_2").is_dir() or (
        index.is_file() and read_json(index).get("boundary_ratio") is not None
    )
    if is_pair or root.name in _EXPERTS or any(inside.joinpath(name).is_dir() for name in _EXPERTS):
        raise CheckpointError(
            f"{path} holds a Wan2.2 model of two networks, for high and for low noise: "
            "give a Wan2.1 text-to-video model"
        )


def refuse_described(folder: Path) -> None:
    """CheckpointError where the JSON files of a model's folder tell that it is another kind of model."""
    refuse_experts(folder)
    for config in (folder / "config.json", folder / "transformer" / "config.json"):
        if config.is_file():
            layouts.refuse_types(config, read_json(config))


def _text_encoders(sources: Sources) -> list[Path]:
    try:
        return [file for file in files_of(sources, "text_encoder") if not file.name.endswith(".json")]
    except CheckpointError:  # named where it is loaded
        return []


def _latent_channels(sources: Sources) -> int:
    """Channels of the latents that the transformer takes; 0 where there is none."""
    try:
        kind = kinds.kind_of(open_files(files_of(sources, "transformer")))
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
