"""The example workflows of the ComfyUI pack: `python tests/comfyui_workflows.py` writes them.

An editor's file holds the values of widgets by position alone, so that an option more means files made anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import miga_engine
from miga_engine.integrations.comfyui.inputs import Input
from miga_engine.integrations.comfyui.nodes import NODES

FOLDER = Path(miga_engine.__file__).parent / "integrations" / "comfyui" / "example_workflows"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
PROMPT = "a red kite over green hills at noon"

CREATE = [Input("images", "IMAGE"), Input("fps", "FLOAT", 30.0), Input("audio", "AUDIO", is_optional=True)]
SAVE = [Input("video", "VIDEO"), Input("filename_prefix", "STRING", "video/ComfyUI"),
        Input("format", "COMBO", "auto"), Input("codec", "COMBO", "auto")]  # fmt: skip
OTHERS = {"CreateVideo": (CREATE, ("VIDEO",)), "SaveVideo": (SAVE, ())}
"""ComfyUI's own nodes that the examples use."""

KINDS = {**{node.id: (node.inputs(), tuple(kind for kind, _ in node.outputs)) for node in NODES}, **OTHERS}

Graph = dict[str, dict[str, Any]]
"""As ComfyUI's /prompt takes it."""


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


GRAPHS: dict[str, Graph] = {
    "generate": {
        "1": _node("MigaLoad"),
        "2": _node("MigaGenerate", engine=["1", 0], prompt=PROMPT, num_frames=65, seed=3),
        "3": _node("CreateVideo", images=["2", 0], fps=["2", 1]),
        "4": _node("SaveVideo", video=["3", 0], filename_prefix="video/miga_generate"),
    },
    "render": {
        "1": _node("MigaLoad"),
        "2": _node("MigaPrompt", frame=80, prompt="a red kite over green hills at dusk"),
        "3": _node("MigaMethod", prompt_blend_frames=32),
        "4": _node("MigaRender", engine=["1", 0], prompt=PROMPT, prompts=["2", 0], miga=["3", 0], num_frames=161,
                   seed=3, filename_prefix="video/miga_render", format="mkv"),
        "5": _node("MigaEval", video=["4", 0]),
    },
    "endless": {
        "1": _node("MigaLoad"),
        "2": _node("MigaRender", engine=["1", 0], prompt=PROMPT, seed=3, filename_prefix="video/miga_endless",
                   format="mkv"),
    },
    "resume": {
        "1": _node("MigaLoad"),
        "2": _node("MigaResume", engine=["1", 0], session="video/miga_endless_00001_.session.safetensors",
                   num_frames=161),
    },
}  # fmt: skip


def full(graph: Graph) -> Graph:
    """With the default of every widget that is left out."""
    made = {}
    for number, node in graph.items():
        defaults = {asked.name: asked.default for asked in KINDS[node["class_type"]][0] if asked.kind in WIDGETS}
        made[number] = {**node, "inputs": {**defaults, **node["inputs"]}}
    return made


def to_editor(graph: Graph) -> dict[str, Any]:
    """A graph as the editor saves it."""
    links: list[list[Any]] = []
    nodes = []
    for place, (number, node) in enumerate(full(graph).items()):
        asked, outputs = KINDS[node["class_type"]]
        slots, values = [], []
        for entry in asked:
            value = node["inputs"].get(entry.name)
            slot: dict[str, Any] = {"name": entry.name, "type": entry.kind, "link": None}
            if isinstance(value, list):
                slot["link"] = len(links) + 1
                source = graph[value[0]]["class_type"]
                links.append([slot["link"], int(value[0]), value[1], int(number), len(slots),
                              KINDS[source][1][value[1]]])  # fmt: skip
            if entry.kind in WIDGETS:
                slot["widget"] = {"name": entry.name}
                values += [entry.default if isinstance(value, list) else value]
                values += ["fixed"] if entry.is_seed else []
            if entry.is_optional:
                slot["shape"] = 7
            slots.append(slot)
        nodes.append({
            "id": int(number), "type": node["class_type"], "pos": [40 + 440 * place, 120], "size": [400, 300],
            "flags": {}, "order": place, "mode": 0, "inputs": slots,
            "outputs": [{"name": kind, "type": kind, "links": []} for kind in outputs],
            "properties": {"Node name for S&R": node["class_type"]}, "widgets_values": values,
        })  # fmt: skip
    for link, source, slot, *_ in links:
        next(node for node in nodes if node["id"] == source)["outputs"][slot]["links"].append(link)
    return {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4}  # fmt: skip


def to_graph(saved: dict[str, Any]) -> Graph:
    """What the editor sends to /prompt of a file that it saved."""
    sources = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    graph: Graph = {}
    for node in saved["nodes"]:
        values = iter(node["widgets_values"])
        inputs = {}
        for entry, slot in zip(KINDS[node["type"]][0], node["inputs"], strict=True):
            if "widget" in slot:
                inputs[slot["name"]] = next(values)
                if entry.is_seed:
                    next(values)
            if slot["link"] is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def read(name: str) -> Graph:
    """An example that ships with the pack."""
    return to_graph(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def text_of(name: str) -> str:
    """The file of an example."""
    return json.dumps(to_editor(GRAPHS[name]), ensure_ascii=False, indent=1) + "\n"


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for name in GRAPHS:
        (folder / f"{name}.json").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
