"""Nodes as ComfyUI wants them described: classes of its V3 schema, and of V1, of the one table of `nodes`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from miga_engine.integrations.comfyui.host import Comfy
from miga_engine.integrations.comfyui.inputs import UNSET, Input
from miga_engine.integrations.comfyui.nodes import NODES, Node

CATEGORY = "miga"
_STEP = 0.01  # of numbers in a widget
_ROUND = 1e-6  # to which the editor rounds what is typed; without it, to the step: 0.005 would become 0.01


def has_v3() -> bool:
    """Whether this ComfyUI has the V3 schema."""
    try:
        return importlib.util.find_spec("comfy_api.latest") is not None
    except ModuleNotFoundError:
        return False


def titles() -> dict[str, str]:
    """What nodes are called on the screen."""
    return {node.id: node.title for node in NODES}


def choices_of(asked: Input, comfy: Comfy) -> list[str]:
    """What a COMBO offers now."""
    if not asked.folders:
        return list(asked.choices)
    return [*([UNSET] if asked.unset is not None else []), *comfy.files(asked.folders)]


def widget(asked: Input, comfy: Comfy) -> tuple[Any, dict[str, Any]]:
    """An input as V1 has it: its type, and what is said of it."""
    said: dict[str, Any] = {"tooltip": asked.help}
    if asked.is_advanced:
        said["advanced"] = True
    if asked.default is not None:
        said["default"] = asked.default
    if asked.kind in ("INT", "FLOAT"):
        said |= {"min": asked.least, "max": asked.most}
    if asked.kind == "FLOAT":
        said |= {"step": _STEP, "round": _ROUND}
    if asked.is_seed:
        said["control_after_generate"] = True
    if asked.kind == "STRING":
        said["multiline"] = asked.is_multiline
    return (choices_of(asked, comfy) if asked.kind == "COMBO" else asked.kind), said


# V1 --------------------------------------------------------------------------------------------------------------


def v1_classes() -> dict[str, type]:
    """Classes of V1 by the ids of nodes."""
    return {node.id: _v1_class(node) for node in NODES}


def _v1_class(node: Node) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        groups: dict[str, Any] = {"required": {}, "optional": {}, "hidden": {"node_id": "UNIQUE_ID"}}
        comfy = Comfy()
        for asked in node.inputs():
            groups["optional" if asked.is_optional else "required"][asked.name] = widget(asked, comfy)
        return groups

    def execute(self: Any, node_id: Any = None, **given: Any) -> dict[str, Any]:
        made = node.run(Comfy(node_id), given)
        return {"result": made.values, **({} if made.shown is None else {"ui": made.shown})}

    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(kind for kind, _ in node.outputs),
        "RETURN_NAMES": tuple(name for _, name in node.outputs),
        "FUNCTION": "execute",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.help,
        "OUTPUT_NODE": node.is_output,
        "execute": execute,
    }
    if node.fingerprint is not None:
        fingerprint = node.fingerprint
        members["IS_CHANGED"] = classmethod(lambda cls, node_id=None, **given: fingerprint(Comfy(), given))
    return type(node.id, (), members)


# V3 --------------------------------------------------------------------------------------------------------------


def extension() -> Any:
    """The pack as the V3 schema has it."""
    latest = importlib.import_module("comfy_api.latest")

    async def get_node_list(self: Any) -> list[type]:
        return [v3_class(node, latest.io) for node in NODES]

    return type("Extension", (latest.ComfyExtension,), {"get_node_list": get_node_list})()


def v3_class(node: Node, io: Any) -> type:
    """A node as a class of the V3 schema, of which `io` is the module."""

    def define_schema(cls: type) -> Any:
        comfy = Comfy()
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=CATEGORY,
            description=node.help,
            inputs=[_v3_input(asked, comfy, io) for asked in node.inputs()],
            outputs=[_v3_type(kind, io).Output(id=f"{name}_out", display_name=name) for kind, name in node.outputs],
            hidden=[io.Hidden.unique_id],
            is_output_node=node.is_output,
        )

    def execute(cls: Any, **given: Any) -> Any:
        made = node.run(Comfy(cls.hidden.unique_id), given)
        return io.NodeOutput(*made.values, ui=made.shown)

    members: dict[str, Any] = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if node.fingerprint is not None:
        fingerprint = node.fingerprint
        members["fingerprint_inputs"] = classmethod(lambda cls, **given: fingerprint(Comfy(), given))
    return type(node.id, (io.ComfyNode,), members)


def _v3_type(kind: str, io: Any) -> Any:
    known = {"IMAGE": "Image", "VIDEO": "Video", "INT": "Int", "FLOAT": "Float", "STRING": "String",
             "BOOLEAN": "Boolean", "COMBO": "Combo"}  # fmt: skip
    return getattr(io, known[kind]) if kind in known else io.Custom(kind)


def _v3_input(asked: Input, comfy: Comfy, io: Any) -> Any:
    kind, said = widget(asked, comfy)
    keywords = {name: value for name, value in said.items() if name != "advanced"}
    if asked.kind == "COMBO":
        keywords["options"] = kind
    made = _v3_type(asked.kind, io).Input(asked.name, optional=asked.is_optional, **keywords)
    if asked.is_advanced:
        made.extra_dict = {"advanced": True}  # the classes of widgets do not take it
    return made
