"""What Diffusers calls the parameters of Wan's transformers: the rule, written once more."""

from __future__ import annotations

_DIFFUSERS = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    *((f".{name}.", f".to_{name}.") for name in "qkv"),
    (".o.", ".to_out.0."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    (".norm3.", ".norm2."),
)


def diffusers_name(key: str) -> str:
    """What diffusers calls a parameter of the transformer."""
    for ours, theirs in _DIFFUSERS:
        key = key.replace(ours, theirs)
    return key
