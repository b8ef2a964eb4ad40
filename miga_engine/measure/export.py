"""Videos and prompt lists in the folders that VBench and NarrLV read, and the script that runs either on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine.errors import ConfigError, OutputError
from miga_engine.files import path_written_whole, write_whole

if TYPE_CHECKING:
    from miga_engine.engine import Engine

FORMATS = ("vbench", "narrlv")
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "temporal_flickering",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""VBench's dimensions that need nothing but the video."""

_LONGEST_NAME = 255  # bytes of a file name

_VBENCH_SCRIPT = """\
#!/bin/sh
# VBench on these videos: pip install vbench, a CUDA device, and its weights, which it downloads itself.
# dynamic_degree is the motion that consistency has to be read beside.
cd "$(dirname "$0")" || exit 1
exec python - <<'PYTHON'
import torch
from vbench import VBench

VBench(torch.device("cuda"), "full_info.json", "results").evaluate(
    videos_path="videos", name="miga", dimension_list={dimensions!r}, mode="vbench_standard"
)
PYTHON
"""
_NARRLV_SCRIPT = """\
#!/bin/sh
# NarrLV on these videos: sh run.sh CHECKOUT, a checkout of AMAP-ML/NarrLV with its requirements, and Qwen2.5-VL and
# Q-Align where its README puts them. Its scripts look for the questions in resource/prompt_suit.
here="$(cd "$(dirname "$0")" && pwd)"
cd "${1:?give a checkout of NarrLV}" || exit 1
mkdir -p resource/prompt_suit && cp "$here"/prompt_suit/*.json resource/prompt_suit/ || exit 1
python answer_gen.py --evaluated_model_name miga --evaluated_model_videos_path "$here/videos" \\
  --answer_save_path "$here/answers" || exit 1
python answer_gen_aes.py --evaluated_model_name miga --evaluated_model_videos_path "$here/videos" \\
  --answer_save_path "$here/answers_aes" || exit 1
python metric_cal.py --evaluated_model_name miga --evaluated_model_videos_path "$here/videos" \\
  --answer_save_path "$here/answers" --answer_aes_save_path "$here/answers_aes" --metric_save_path "$here/results"
"""


@dataclass(frozen=True)
class Clip:
    """One video to make: where below the export's folder, of what, and which of that prompt's (added to the seed)."""

    path: str
    prompt: str
    sample: int = 0


def plan_vbench(prompts: Path, samples: int) -> tuple[list[Clip], dict[str, str]]:
    """Clips `videos/{prompt}-{index}.mp4`, and the text files beside them by name.

    prompts: lines of text, or VBench's own `VBench_full_info.json`. Raises ConfigError.
    """
    text = _read(prompts)
    if prompts.suffix == ".json":
        entries = _parsed(prompts, text)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "prompt_en" in e for e in entries):
            raise ConfigError(f"{prompts} is no list of entries with prompt_en: give one like VBench_full_info.json")
    else:
        lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
        entries = [{"prompt_en": line, "dimension": list(DIMENSIONS)} for line in lines]
    names = list(dict.fromkeys(str(entry["prompt_en"]) for entry in entries))
    if not names:
        raise ConfigError(f"{prompts} holds no prompts: give one a line")
    clips = []
    for prompt in names:
        for i in range(samples):
            name = f"{prompt}-{i}.mp4"
            if "/" in name or len(name.encode()) > _LONGEST_NAME:
                raise ConfigError(
                    f"the prompt {prompt[:60]!r} cannot be the name of a file, which VBench reads it from: shorten it "
                    f"to {_LONGEST_NAME - 6} bytes, without /"
                )
            clips.append(Clip(f"videos/{name}", prompt, i))
    found = {dimension for entry in entries for dimension in entry.get("dimension", ())}
    dimensions = [dimension for dimension in DIMENSIONS if dimension in found]
    files = {
        "prompts.txt": "\n".join(names) + "\n",
        "full_info.json": json.dumps(entries, indent=1, ensure_ascii=False) + "\n",
        "run.sh": _VBENCH_SCRIPT.format(dimensions=dimensions),
    }
    return clips, files


def plan_narrlv(prompts: Path) -> tuple[list[Clip], dict[str, str]]:
    """Clips `videos/{suite}/{key}_{index}_{start of the prompt}.mp4`, and the text files beside them by name.

    prompts: a file of NarrLV's `resource/prompt_suite`, or that folder. The questions are in it, so a plain list of
    prompts will not do. Raises ConfigError.
    """
    suites = sorted(prompts.glob("*.json")) if prompts.is_dir() else [prompts]
    if not suites:
        raise ConfigError(f"the folder {prompts} holds no .json: give NarrLV's resource/prompt_suite")
    clips: list[Clip] = []
    files = {"run.sh": _NARRLV_SCRIPT}
    for suite in suites:
        content = _parsed(suite, _read(suite))
        entries = list(_narrlv_entries(content))
        if not entries:
            raise ConfigError(
                f"{suite} is no prompt suite of NarrLV, {{key: [{{prompt_gen, auto_gen_question, …}}]}}: give a file "
                "of its resource/prompt_suite"
            )
        for key, index, entry in entries:
            prompt = entry["prompt_gen"].strip().removeprefix("```").removesuffix("```").strip()
            start = re.sub(r"[/\s]", " ", prompt[:20])
            clips.append(Clip(f"videos/{suite.stem}/{key}_{index}_{start}.mp4", prompt))
            for name in ("element_extract", "auto_gen_question"):  # stored under one name and read under another
                entry.setdefault(f"{name}_1", entry[name])
        files[f"prompt_suit/{suite.name}"] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return clips, files


def _narrlv_entries(content: Any) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for key, group in content.items() if isinstance(content, dict) else ():
        for index, entry in enumerate(group if isinstance(group, list) else ()):
            if isinstance(entry, dict) and {"prompt_gen", "element_extract", "auto_gen_question"} <= entry.keys():
                yield key, index, entry


def export(
    engine: Engine,
    folder: Path,
    clips: list[Clip],
    files: dict[str, str],
    *,
    num_frames: int | None = None,
    seed: int = 0,
    on_clip: Callable[[Clip], object] | None = None,
    **options: Any,
) -> int:
    """Makes the clips that are not there yet below `folder` and writes the files; how many were made.

    num_frames defaults to the paper's protocol for the engine's preset; the other options are those of
    `Engine.generate`. A clip appears whole or not at all, so an interrupted export goes on where it stopped, and
    `protocol.json` holds what the clips were made with. Raises OutputError where it differs from that.
    """
    num_frames = engine.bundle.facts.protocol_frames if num_frames is None else num_frames
    request = engine.resolve(clips[0].prompt, num_frames=num_frames, seed=seed, **options)
    record = {k: v for k, v in request.metadata(engine.name).items() if k != "prompt"}
    protocol = json.dumps(record, indent=1, sort_keys=True, default=str) + "\n"
    path = folder / "protocol.json"
    if path.is_file() and path.read_text(encoding="utf-8") != protocol:
        raise OutputError(f"{folder} holds an export made with other options: give another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**files, "protocol.json": protocol}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text)
    num_made = 0
    for clip in clips:
        target = folder / clip.path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            video = engine.generate(clip.prompt, num_frames, seed=seed + clip.sample, **options)
            with path_written_whole(target) as partial:
                video.save(partial)
            num_made += 1
        if on_clip is not None:
            on_clip(clip)
    return num_made


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"the prompts {path} cannot be read: {reason}") from error


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
