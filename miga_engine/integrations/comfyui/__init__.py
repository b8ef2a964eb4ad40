"""Nodes for ComfyUI. Link this folder into its `custom_nodes`, or write there a file of one line, docs/comfyui.md says
which."""

from __future__ import annotations

from typing import Any

from miga_engine.integrations.comfyui import schema

NODE_CLASS_MAPPINGS: dict[str, Any] | None = None if schema.has_v3() else schema.v1_classes()
"""For a ComfyUI without the V3 schema; one that has it takes `comfy_entrypoint` where this is None."""

NODE_DISPLAY_NAME_MAPPINGS = schema.titles()


async def comfy_entrypoint() -> Any:
    """The pack for a ComfyUI with the V3 schema."""
    return schema.extension()
