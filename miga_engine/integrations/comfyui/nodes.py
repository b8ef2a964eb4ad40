"""The nodes: what each asks for, gives and does. What does not concern ComfyUI's classes is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from miga_engine.config import NUM_FRAMES, LoadOptions, MigaConfig, StreamOptions
from miga_engine.device import amount
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.integrations.comfyui.host import Comfy, Managed
from miga_engine.integrations.comfyui.inputs import FOLDERS, Input, inputs_of, taken, whole
from miga_engine.integrations.comfyui.making import Files, OpenStream, given_out, go_on, write
from miga_engine.options import picked
from miga_engine.request import Request

ENGINE, METHOD, PROMPTS, LORA = "MIGA_ENGINE", "MIGA_METHOD", "MIGA_PROMPTS", "MIGA_LORA"
LORAS = ("loras",)


class Made(NamedTuple):
    """What a node gives: values of its outputs, and what the screen is told."""

    values: tuple[Any, ...]
    shown: dict[str, Any] | None = None


class Node(NamedTuple):
    """A node of the pack."""

    id: str
    title: str
    help: str
    inputs: Callable[[], list[Input]]
    outputs: tuple[tuple[str, str], ...]
    """Type and name of each."""
    run: Callable[[Comfy, dict[str, Any]], Made]
    is_output: bool = False
    fingerprint: Callable[[Comfy, dict[str, Any]], Any] | None = None
    """What decides, beside its inputs, whether it is run again."""


# The model -------------------------------------------------------------------------------------------------------


def _load_inputs() -> list[Input]:
    return inputs_of(LoadOptions, basic=("model", "transformer", "vae", "text_encoder", "lora", "dtype"))


def _load(comfy: Comfy, given: dict[str, Any]) -> Made:
    options = whole(LoadOptions, taken(given, _load_inputs()))
    for name in FOLDERS.keys() & options.keys():
        options[name] = comfy.path_of(FOLDERS[name], options[name])
    options.setdefault("device", comfy.device())
    if options["device"].startswith("cuda"):
        comfy.make_room(Engine.estimate(**options).device_total, options["device"])
    model = Managed(Engine.from_pretrained(**options), is_compiled=bool(options.get("compile")))
    comfy.hold(model)
    return Made((model,))


def _lora_inputs() -> list[Input]:
    return [
        Input("file", "COMBO", folders=LORAS, help="LoRA file to merge into the transformer"),
        Input("strength", "FLOAT", 1.0, "how strongly it acts", -100.0, 100.0),
        Input("before", LORA, help="those that act before it", is_optional=True),
    ]


def _lora(comfy: Comfy, given: dict[str, Any]) -> Made:
    here = (comfy.path_of(LORAS, given["file"]), float(given["strength"]))
    return Made(((*(given.get("before") or ()), here),))


# What is asked for -----------------------------------------------------------------------------------------------


def _method_inputs() -> list[Input]:
    return [asked._replace(is_advanced=False) for asked in inputs_of(MigaConfig)]


def _method(comfy: Comfy, given: dict[str, Any]) -> Made:
    return Made((whole(MigaConfig, taken(given, _method_inputs())),))


def _prompt_inputs() -> list[Input]:
    return [
        Input("frame", "INT", 0, "video frame from which on this prompt holds", 0, 10**9),
        Input("prompt", "STRING", "", "what the video shows from there on", is_multiline=True),
        Input("others", PROMPTS, help="prompts at other frames", is_optional=True),
    ]


def _prompt(comfy: Comfy, given: dict[str, Any]) -> Made:
    others = given.get("others") or {}
    if given["frame"] in others:
        raise ConfigError(f"frame is {given['frame']}, and another prompt begins there: give each its own frame")
    return Made(({**others, given["frame"]: given["prompt"]},))


def _video_inputs(num_frames: int | None) -> list[Input]:
    """Options of a video; those of its method come from another node."""
    basic = ("num_frames", "seed", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")
    options = inputs_of(Request, basic=(*basic, "image", "video"))
    if num_frames is not None:
        options = [
            asked._replace(default=num_frames, least=1, unset=None, help="video frames, exactly")
            if asked.name == "num_frames" else asked
            for asked in options
        ]  # fmt: skip
    return [
        Input("engine", ENGINE, help="the model"),
        Input("prompt", "STRING", "", "what the video shows", is_multiline=True),
        Input("prompts", PROMPTS, help="further prompts, by their first frame", is_optional=True),
        Input("miga", METHOD, help="options of the method", is_optional=True),
        *options,
        *inputs_of(StreamOptions),
    ]


def _asked(given: dict[str, Any], inputs: Iterable[Input]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Prompt, options of the video, options of the stream."""
    options = taken(given, [asked for asked in inputs if asked.name not in ("engine", "prompt", "prompts", "miga")])
    prompts = dict(given.get("prompts") or {})
    if given["prompt"].strip() or not prompts:
        if 0 in prompts:
            raise ConfigError("prompt is given, and so is one at frame 0 of prompts: leave one of the two empty")
        prompts[0] = given["prompt"]
    for name in {"image", "video"} & options.keys():
        pictures = (options[name][..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        options[name] = pictures[0] if name == "image" else pictures
    streamed = picked(options, StreamOptions)
    asked = {name: value for name, value in options.items() if name not in streamed}
    if given.get("miga"):
        asked["miga"] = given["miga"]
    prompt = prompts[0] if set(prompts) == {0} else prompts
    return prompt, whole(Request, asked), streamed


def _opening(comfy: Comfy, model: Managed, given: dict[str, Any], inputs: list[Input]) -> tuple[Request, OpenStream]:
    """The request, resolved, and what begins its stream, once there is memory for it."""
    comfy.hold(model)
    prompt, options, streamed = _asked(given, inputs)
    request = model.engine.resolve(prompt, **options)
    _make_room(comfy, model, request)
    return request, lambda on_event, is_cancelled: model.engine.run(
        request, on_event=on_event, is_cancelled=is_cancelled, **streamed
    )


def _make_room(comfy: Comfy, model: Managed, request: Request) -> None:
    if model.engine.device.type == "cuda":
        needed = model.engine.running_bytes(request, request.miga.window_batch or 1) - model.loaded_size()
        comfy.hold(model, max(0, needed))


# Videos ----------------------------------------------------------------------------------------------------------


def _generate_inputs() -> list[Input]:
    return _video_inputs(NUM_FRAMES)


def _generate(comfy: Comfy, given: dict[str, Any]) -> Made:
    model: Managed = given["engine"]
    request, open_stream = _opening(comfy, model, given, _generate_inputs())
    num_frames = request.num_frames or NUM_FRAMES
    shape = (num_frames, request.height, request.width, 3)
    needed, free = 4 * num_frames * request.height * request.width * 3, comfy.free_bytes()
    if needed > free:
        raise ConfigError(
            f"num_frames is {num_frames}: as IMAGE they would take {amount(needed)} of memory, and {amount(free)} are "
            "free; ask for fewer, or use the node that renders into a file"
        )
    images, num_out = torch.empty(shape), 0
    for frames in given_out(comfy, model, open_stream):
        images[num_out : num_out + len(frames)] = frames.cpu().float() / 255
        num_out += len(frames)
    return Made((images, _rate(request)))


def _rate(request: Request) -> float:
    above, _, below = str(request.fps).partition("/")
    return float(above) / float(below or 1)


def _file_inputs() -> list[Input]:
    return [
        Input("filename_prefix", "STRING", "video/miga", "beginning of the file's name in ComfyUI's output folder"),
        Input("format", "COMBO", "mp4", "of the file; mkv is lossless", choices=("mp4", "mkv")),
        Input("keep_session", "BOOLEAN", False, "keep the session file of a finished video, so that it can be made "
              "longer; one that was interrupted always has it"),
        Input("save_every", "INT", 500, "video frames between two session files, 0: only when it is interrupted", 0,
              10**9),
    ]  # fmt: skip


def _render_inputs() -> list[Input]:
    return [*_video_inputs(None), *_file_inputs()]


def _render(comfy: Comfy, given: dict[str, Any]) -> Made:
    model: Managed = given["engine"]
    request, open_stream = _opening(comfy, model, given, _video_inputs(None))
    path = comfy.new_file(given["filename_prefix"], f".{given['format']}", int(request.width), int(request.height))
    files = Files(path, Files.session_beside(path), given["save_every"] or None, given["keep_session"])
    write(comfy, model, open_stream, files)
    return Made((comfy.video(path), str(path)), comfy.shown(path))


def _resume_inputs() -> list[Input]:
    (longer,) = [asked for asked in inputs_of(Request) if asked.name == "num_frames"]
    longer = longer._replace(help="video frames of the whole video (0: as it was asked for)", is_advanced=False)
    return [
        Input("engine", ENGINE, help="the model that the video was begun with"),
        Input("session", "COMBO", folders=("sessions",), help="session file in ComfyUI's output folder"),
        longer,
        *inputs_of(StreamOptions),
        *_file_inputs()[2:],
    ]


def _resume(comfy: Comfy, given: dict[str, Any]) -> Made:
    model: Managed = given["engine"]
    comfy.hold(model)
    options = whole(Request, taken(given, _resume_inputs()[2:-2]))
    session = comfy.session_path(given["session"])
    path = go_on(comfy, model, session, options, given["save_every"] or None, given["keep_session"])
    return Made((comfy.video(path), str(path)), comfy.shown(path))


def _session_state(comfy: Comfy, given: dict[str, Any]) -> Any:
    path = comfy.output_folder / str(given["session"])
    return path.stat().st_mtime_ns if path.is_file() else 0


# Measures --------------------------------------------------------------------------------------------------------


def _eval_inputs() -> list[Input]:
    return [Input("video", "VIDEO", help="the video to measure")]


def _eval(comfy: Comfy, given: dict[str, Any]) -> Made:
    from miga_engine.measure import measures, report
    from miga_engine.video.reading import opened_video

    source = given["video"].get_stream_source()
    if isinstance(source, str):
        with opened_video(source) as video:
            measured = measures.measure(
                measures.in_parts(video.frames), None if video.fps is None else float(video.fps)
            )
    else:
        images = given["video"].get_components().images
        measured = measures.measure((images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    result = {Path(source).name if isinstance(source, str) else "video": measured}
    table = report.table(result)
    return Made((table, json.dumps(result, ensure_ascii=False)), {"text": (table,)})


# -----------------------------------------------------------------------------------------------------------------

_VIDEO = (("VIDEO", "video"), ("STRING", "path"))

NODES: tuple[Node, ...] = (
    Node("MigaLoad", "MIGA Load", "A short-clip model, for videos without end. Files lie in ComfyUI's own folders.",
         _load_inputs, ((ENGINE, "engine"),), _load),
    Node("MigaLora", "MIGA LoRA", "A LoRA file for MIGA Load; several in a chain act in their order.",
         _lora_inputs, ((LORA, "lora"),), _lora),
    Node("MigaMethod", "MIGA Method", "Options of the method, where they differ from those of the model's preset.",
         _method_inputs, ((METHOD, "miga"),), _method),
    Node("MigaPrompt", "MIGA Prompt at", "A prompt from a frame on; several in a chain are a timeline.",
         _prompt_inputs, ((PROMPTS, "prompts"),), _prompt),
    Node("MigaGenerate", "MIGA Generate", "A video as pictures in memory.",
         _generate_inputs, (("IMAGE", "images"), ("FLOAT", "fps")), _generate),
    Node("MigaRender", "MIGA Render", "A video of any length into a file, frame by frame. 0 frames: until you "
         "interrupt it.", _render_inputs, _VIDEO, _render, is_output=True),
    Node("MigaResume", "MIGA Resume", "Goes on with a video that was interrupted, or makes a finished one longer.",
         _resume_inputs, _VIDEO, _resume, is_output=True, fingerprint=_session_state),
    Node("MigaEval", "MIGA Eval", "Consistency, motion and drift of a video.",
         _eval_inputs, (("STRING", "table"), ("STRING", "json")), _eval, is_output=True),
)  # fmt: skip
