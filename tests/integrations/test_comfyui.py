"""The pack for ComfyUI, without one: what its nodes ask for, do, keep, refuse. `tests/comfyui_run.py` has the rest."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfyui_workflows
import golden_model
import pytest
import torch

from miga_engine import ConfigError, Engine, __version__
from miga_engine.config import LoadOptions, MigaConfig, StreamOptions
from miga_engine.fields import option
from miga_engine.integrations.comfyui import comfy_entrypoint, nodes, schema
from miga_engine.integrations.comfyui.host import Comfy
from miga_engine.integrations.comfyui.inputs import Input, inputs_of, taken
from miga_engine.options import fields
from miga_engine.request import Request
from miga_engine.video.reading import read_video

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHOD = {name: value for name, value in dataclasses.asdict(golden_model.MIGA).items() if value is not None}
VIDEO: dict[str, Any] = {**golden_model.OPTIONS, "prompt": "a red balloon", "num_frames": 21, "seed": 3}
NODES = {node.id: node for node in nodes.NODES}


class _InterruptedError(Exception):
    """As ComfyUI has one of its own."""


class _Video:
    def __init__(self, path: str) -> None:
        self.get_stream_source = lambda: path


class _Host:
    """The few functions of ComfyUI that the pack calls, which note what they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, []
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.told: list[tuple[int, int, Any]] = []
        self.free = 10**12
        for name in ("loras", "output"):
            (folder / name).mkdir()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def end() -> None:
            if self.is_interrupted():
                raise _InterruptedError

        def update(value: int, total: int, preview: Any) -> None:
            self.told.append((value, total, preview))

        modules: dict[str, dict[str, Any]] = {
            "folder_paths": {
                "folder_names_and_paths": {"loras": ([str(self.folder / "loras")], set())},
                "get_filename_list": lambda name: [],
                "get_folder_paths": lambda name: [str(self.folder / name)],
                "get_output_directory": lambda: str(self.folder / "output"),
                "get_save_image_path": lambda prefix, folder, width, height: (folder, prefix, 1, "", prefix),
            },
            "comfy": {},
            "comfy.model_management": {
                "processing_interrupted": lambda: self.is_interrupted(),
                "throw_exception_if_processing_interrupted": end,
                "get_torch_device": lambda: torch.device("cpu"),
                "get_free_memory": lambda device: self.free,
                "load_models_gpu": lambda models, memory_required: self.held.extend(models),
            },
            "comfy.utils": {"ProgressBar": lambda total, node_id: types.SimpleNamespace(update_absolute=update)},
            "comfy_api.input_impl": {
                "VideoFromFile": lambda path: types.SimpleNamespace(get_stream_source=lambda: path)
            },
        }
        for name, members in modules.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Host:
    host = _Host(tmp_path)
    host.install(monkeypatch)
    return host


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def frames(folder: Path) -> torch.Tensor:
    given = {**VIDEO, "miga": METHOD}
    return Engine.from_pretrained(folder, "cpu").generate(**given).frames


def run(name: str, **given: Any) -> tuple[Any, ...]:
    """A node's values, with the defaults of its widgets."""
    asked = {entry.name: entry.default for entry in NODES[name].inputs() if entry.default is not None}
    return NODES[name].run(Comfy("7"), {**asked, **given}).values


def loaded(folder: Path) -> Any:
    return run("MigaLoad", model=str(folder))[0]


# What is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("MigaLoad", (LoadOptions,)),
        ("MigaMethod", (MigaConfig,)),
        ("MigaGenerate", (Request, StreamOptions)),
        ("MigaRender", (Request, StreamOptions)),
    ],
)
def test_every_option_of_the_table_is_an_input_and_left_alone_says_nothing(name: str, records: Any) -> None:
    inputs = {entry.name: entry for entry in NODES[name].inputs()}
    for record in records:
        options = fields(record)
        assert options.keys() <= inputs.keys()
        said = taken({entry.name: entry.default for entry in inputs.values()}, [inputs[name] for name in options])
        defaults = {name: option.default for name, option in options.items() if option.default is not None}
        defaults |= {"num_frames": 240} if name == "MigaGenerate" and record is Request else {}
        assert said == ({} if record is MigaConfig else defaults)


@pytest.mark.parametrize("entry", inputs_of(MigaConfig) + inputs_of(Request), ids=lambda entry: entry.name)
def test_what_a_widget_can_say_the_record_takes(entry: Input) -> None:
    """Its bounds and its choices, but for the value that says nothing."""
    values = [entry.least, entry.most] if entry.kind in ("INT", "FLOAT") else list(entry.choices)
    for value in values:
        for name, said in taken({entry.name: value}, [entry]).items():
            record: Any = MigaConfig if name in fields(MigaConfig) else Request
            record(**({"prompt": "any"} if record is Request else {}), **{name: said})


def test_an_option_more_is_an_input_and_arrives(host: _Host, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the pack is written for it."""

    @dataclasses.dataclass(frozen=True)
    class MoreMethod(MigaConfig):
        grain: int | None = option(None, "film grain", least=1, most=9)

    @dataclasses.dataclass(frozen=True)
    class MoreLoad(LoadOptions):
        slices: bool = option(False, "decode in slices")

    monkeypatch.setattr(nodes, "MigaConfig", MoreMethod)
    monkeypatch.setattr(nodes, "LoadOptions", MoreLoad)
    (grain,) = [entry for entry in NODES["MigaMethod"].inputs() if entry.name == "grain"]
    assert (grain.kind, grain.default, grain.least, grain.most) == ("INT", 0, 0, 9)
    (method,) = run("MigaMethod", grain=5)
    assert method == {"grain": 5}
    given: dict[str, Any] = {}

    class Made:
        device, is_loaded = torch.device("cpu"), True

        def network_bytes(self) -> int:
            return 1

        def resolve(self, prompt: Any, **options: Any) -> None:
            given.update(options)
            raise ConfigError("enough")

    monkeypatch.setattr(nodes.Engine, "from_pretrained", lambda **options: given.update(options) or Made())
    (model,) = run("MigaLoad", slices=True)
    with pytest.raises(ConfigError, match="enough"):
        run("MigaGenerate", engine=model, prompt="a kite", miga=method)
    assert given["slices"] is True
    assert given["miga"] == {"grain": 5}


# What is made ----------------------------------------------------------------------------------------------------


def test_pictures_are_the_engines_frames(host: _Host, folder: Path, frames: torch.Tensor) -> None:
    images, fps = run("MigaGenerate", engine=loaded(folder), miga=METHOD, **VIDEO)
    assert images.dtype == torch.float32
    assert torch.equal((images * 255).round().byte(), frames)
    assert fps == 16
    done, totals = [value for value, _, _ in host.told], {total for _, total, _ in host.told}
    assert done == sorted(done)
    assert totals == {done[-1]}
    kinds = {preview[0] for _, _, preview in host.told if preview is not None}
    assert kinds == {"JPEG"}


def test_a_file_is_written_frame_by_frame_and_made_longer(host: _Host, folder: Path, frames: torch.Tensor) -> None:
    model = loaded(folder)
    asked = {**VIDEO, "num_frames": 13, "filename_prefix": "kite", "format": "mkv"}
    video, path = run("MigaRender", engine=model, miga=METHOD, **asked, keep_session=True)
    assert path == video.get_stream_source() == str(host.folder / "output" / "kite_00001_.mkv")
    assert len(read_video(path)) == 13
    (session,) = Comfy().sessions()
    before = NODES["MigaResume"].fingerprint(Comfy(), {"session": session})
    _, same = run("MigaResume", engine=model, session=session, num_frames=21)
    assert same == path
    assert torch.equal(torch.from_numpy(read_video(path)), frames)
    assert not Comfy().sessions()  # finished, and not to be kept
    assert NODES["MigaResume"].fingerprint(Comfy(), {"session": session}) != before
    table, _ = run("MigaEval", video=video)
    assert "consistency" in table


@pytest.mark.parametrize("num_layers", [10, 700, 1600])
def test_an_interruption_within_a_pass_is_gone_on_with(
    host: _Host, folder: Path, frames: torch.Tensor, num_layers: int
) -> None:
    model, looks = loaded(folder), iter(range(10**9))
    host.is_interrupted = lambda: next(looks) > num_layers
    asked = {**VIDEO, "filename_prefix": "kite", "format": "mkv"}
    with pytest.raises(_InterruptedError):
        run("MigaRender", engine=model, miga=METHOD, **asked)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    host.is_interrupted = lambda: False
    if num_layers == 10:  # the prompt was being encoded
        return
    (session,) = Comfy().sessions()
    _, path = run("MigaResume", engine=model, session=session)
    assert torch.equal(torch.from_numpy(read_video(path)), frames)


def test_unloaded_by_its_host_a_model_comes_back(host: _Host, folder: Path, frames: torch.Tensor) -> None:
    model = loaded(folder)
    assert host.held == [model]
    assert model.loaded_size() == model.model_size() > 0
    assert model.partially_unload("cpu", 1) == 0
    model.detach(unpatch_all=False)  # another entry takes its place
    assert model.engine.is_loaded
    size = model.model_size()
    model.detach()
    assert (model.engine.is_loaded, model.loaded_size(), model.model_size()) == (False, 0, size)
    images, _ = run("MigaGenerate", engine=model, miga=METHOD, **VIDEO)
    assert torch.equal((images * 255).round().byte(), frames)
    assert model.engine.is_loaded


def test_prompts_and_loras_in_chains(host: _Host) -> None:
    (first,) = run("MigaPrompt", frame=80, prompt="dusk")
    (both,) = run("MigaPrompt", frame=160, prompt="night", others=first)
    assert both == {80: "dusk", 160: "night"}
    prompt, _, _ = nodes._asked({"prompt": "noon", "prompts": both}, ())
    assert prompt == {0: "noon", 80: "dusk", 160: "night"}
    with pytest.raises(ConfigError, match="frame is 80, and another prompt begins there"):
        run("MigaPrompt", frame=80, prompt="dawn", others=first)
    for name in ("a.safetensors", "b.gguf"):
        (host.folder / "loras" / name).touch()
    (one,) = run("MigaLora", file="a.safetensors", strength=0.5)
    (two,) = run("MigaLora", file="b.gguf", before=one)
    assert [(Path(path).name, strength) for path, strength in two] == [("a.safetensors", 0.5), ("b.gguf", 1.0)]
    assert Comfy().files(["loras"]) == ["b.gguf"]  # ComfyUI lists the others itself
    LoadOptions(lora=two)


def test_what_cannot_be_is_said(host: _Host, folder: Path) -> None:
    model = loaded(folder)
    host.free = 1000
    with pytest.raises(ConfigError, match=r"num_frames is 21: .* use the node that renders into a file"):
        run("MigaGenerate", engine=model, miga=METHOD, **VIDEO)
    with pytest.raises(ConfigError, match="is not in ComfyUI's output folder"):
        run("MigaResume", engine=model, session="../outside.session.safetensors")
    with pytest.raises(ConfigError, match=r"'../x' is in none of ComfyUI's folders loras"):
        run("MigaLora", file="../x")
    with pytest.raises(ConfigError, match="prompt is given, and so is one at frame 0"):
        nodes._asked({"prompt": "noon", "prompts": {0: "dusk"}}, ())


# As ComfyUI sees it ----------------------------------------------------------------------------------------------


def test_classes_of_v1(host: _Host) -> None:
    classes = schema.v1_classes()
    assert classes.keys() == NODES.keys() == schema.titles().keys()
    kind, said = classes["MigaGenerate"].INPUT_TYPES()["optional"]["seed"]
    assert (kind, said["max"], said["control_after_generate"]) == ("INT", 2**64 - 1, True)
    kind, said = classes["MigaLoad"].INPUT_TYPES()["optional"]["transformer"]
    assert kind == ["default"]
    made = classes["MigaPrompt"]().execute(node_id="1", frame=3, prompt="dusk")
    assert made == {"result": ({3: "dusk"},)}
    assert classes["MigaRender"].OUTPUT_NODE
    assert classes["MigaRender"].RETURN_TYPES == ("VIDEO", "STRING")


def test_classes_of_v3(host: _Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against something that only notes what it is given."""

    class Noted(types.SimpleNamespace):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(args=args, **given)

    def comfy_type(name: str) -> Any:
        return types.SimpleNamespace(Input=lambda id, **given: Noted(id=id, kind=name, **given), Output=Noted)

    io = types.SimpleNamespace(
        Schema=Noted, NodeOutput=Noted, ComfyNode=object, Hidden=types.SimpleNamespace(unique_id="unique_id"),
        Custom=comfy_type, **{name: comfy_type(name) for name in ("Image", "Video", "Int", "Float", "String", "Boolean",
                                                                  "Combo")},
    )  # fmt: skip
    for node in nodes.NODES:
        cls: Any = schema.v3_class(node, io)
        described = cls.define_schema()
        asked = {entry.id: entry for entry in described.inputs}
        assert list(asked) == [entry.name for entry in node.inputs()]
        assert not asked.keys() & {entry.id for entry in described.outputs}  # it refuses these
        assert described.is_output_node == node.is_output
    cls = schema.v3_class(NODES["MigaPrompt"], io)
    cls.hidden = types.SimpleNamespace(unique_id="1")
    assert cls.execute(frame=3, prompt="dusk").args == ({3: "dusk"},)
    latest = types.SimpleNamespace(io=io, ComfyExtension=object)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)  # type: ignore[arg-type]
    entry = comfy_entrypoint()
    with pytest.raises(StopIteration) as ended:
        entry.send(None)
    with pytest.raises(StopIteration) as listed:
        ended.value.value.get_node_list().send(None)
    assert [cls.__name__ for cls in listed.value.value] == list(NODES)


@pytest.mark.parametrize("name", comfyui_workflows.GRAPHS)
def test_examples_are_of_these_nodes(name: str) -> None:
    path = comfyui_workflows.FOLDER / f"{name}.json"
    assert path.read_text(encoding="utf-8") == comfyui_workflows.text_of(name), "python tests/comfyui_workflows.py"
    assert comfyui_workflows.read(name) == comfyui_workflows.full(comfyui_workflows.GRAPHS[name])


def test_the_pack_has_the_versions_of_the_package() -> None:
    folder = comfyui_workflows.FOLDER.parent
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == __version__
    assert (folder / "requirements.txt").read_text().split() == project["project"]["dependencies"]
