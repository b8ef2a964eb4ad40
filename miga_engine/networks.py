"""The networks of an engine: read of files or made of parts in memory, moved to another device, given back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miga_engine import ops
from miga_engine.calls import ComponentsCall, LoadCall
from miga_engine.config import LoadOptions
from miga_engine.device import give_back, own_modes, resolve_device
from miga_engine.errors import ConfigError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Components, Sources
from miga_engine.models.layers import allows_tf32, copied_to, set_tf32
from miga_engine.models.loading import bundle_of_components, load_bundle, sources_of
from miga_engine.presets import PRESETS, Preset
from miga_engine.prompts import check_text
from miga_engine.tiny import WEIGHTS_DIR
from miga_engine.weights.held import held


class Networks:
    """A model that is there, or is read again where it was given back: by `read`, for a device; None: it cannot be.

    Whoever holds the bundle that it was keeps it: nothing changes under a stream.
    """

    def __init__(self, bundle: ModelBundle, read: Callable[[torch.device], ModelBundle] | None = None) -> None:
        self._bundle: ModelBundle | None = bundle
        self._read = read
        self.device = bundle.device

    @property
    def is_there(self) -> bool:
        """Whether the networks are in memory."""
        return self._bundle is not None

    @property
    def bundle(self) -> ModelBundle:
        """The model, read again where it was given back."""
        if self._bundle is None:
            self._bundle = self._again()
        return self._bundle

    @own_modes()
    def _again(self) -> ModelBundle:
        if self._read is None:
            raise ConfigError(
                "the engine was unloaded, and its networks were given to it in memory: make another with "
                "`Engine.from_components`"
            )
        return self._read(self.device)

    def unload(self) -> None:
        """Let go of the networks, and of what libraries hold back of their memory."""
        self._bundle = None
        give_back(self.device)

    @own_modes()
    def transfer(self, device: torch.device) -> None:
        """Have the networks on another device, in the same dtypes; where they were, their memory is given back."""
        before, bundle = self.device, self._bundle
        if device == before:
            return
        if bundle is not None:
            _check_tf32("tf32" if allows_tf32(bundle.vae) else None, device)
            bundle = moved(bundle, device) if bundle.transformer.is_movable else None
        self._bundle, self.device = bundle, device
        give_back(before)

    def num_bytes(self) -> int:
        """Of the weights that are held now; those that several share count once."""
        if self._bundle is None:
            return 0
        parts = [self._bundle.transformer, self._bundle.vae, self._bundle.__dict__.get("text_encoder")]
        tensors: list[Tensor] = [tensor for part in parts if part is not None for tensor in part.state_dict().values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def moved(bundle: ModelBundle, device: torch.device) -> ModelBundle:
    """A model's copy on another device; its text encoder is read there when the next prompt is encoded."""
    transformer = copied_to(device, bundle.transformer)
    if bundle.transformer._compiled_call_impl is not None:
        transformer.compile()
    return dataclasses.replace(
        bundle,
        device=device,
        transformer=transformer,
        vae=copied_to(device, bundle.vae),
        open_text_encoder=functools.partial(bundle.open_text_encoder, device=device),
    )


def read(given: LoadCall, target: torch.device) -> tuple[Networks, Sources, str]:
    """A model of files, where it is from, and its name."""
    compute = compute_dtype(given, target)
    name = str(given.transformer or "tiny" if given.model == "tiny" else given.model)
    sources = sources_of(given, WEIGHTS_DIR if name == "tiny" else None)
    _check_preset(given.preset)

    def read_on(device: torch.device) -> ModelBundle:
        _check_tf32(given.vae_dtype, device)
        return _prepared(load_bundle(sources, device, compute, _dtype(given.vae_dtype)), given, device)

    return Networks(read_on(target), read_on), sources, name


def of_components(given: ComponentsCall) -> tuple[Networks, Sources, str]:
    """A model of parts in memory, which is from nowhere, and its name."""
    _check_preset(given.preset)
    own = held("transformer", given.transformer).device
    target = own if given.device is None else resolve_device(given.device)
    _check_tf32(given.vae_dtype, target)
    parts = Components(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Components)})
    dtype, vae_dtype = (None if asked is None else _dtype(asked) for asked in (given.dtype, given.vae_dtype))
    bundle = bundle_of_components(parts, target, dtype, vae_dtype, given.extra())
    for prompt, embedding in given.prompts().items():
        hold(bundle, embedding, prompt)
    bundle = _prepared(bundle, given, target)
    return Networks(bundle), Sources(bundle.path, decoder=given.decoder), given.name


def hold(bundle: ModelBundle, embedding: Any, prompt: str | None) -> str:
    """Have a prompt mean an embedding [T,D] or [1,T,D], or give it a name; the prompt. Raises ConfigError."""
    name = "the embedding" + ("" if prompt is None else f" of the prompt {reprlib.repr(prompt)}")
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        raise ConfigError(f"{name} is of type {type(embedding).__name__}: give a tensor of floats [T,D]")
    tokens = embedding.detach()
    tokens = tokens[0] if tokens.ndim == 3 and len(tokens) == 1 else tokens
    width, most = bundle.text_dim, bundle.facts.text_len
    if tokens.ndim != 2 or tokens.shape[1] != width:
        raise ConfigError(f"{name} has shape {list(embedding.shape)}: the model takes [T, {width}]")
    used = tokens.any(dim=1).nonzero()
    tokens = tokens[: int(used[-1]) + 1 if len(used) else 1].to("cpu", copy=True)
    if len(tokens) > most:
        raise ConfigError(f"{name} has {len(tokens)} tokens: the model takes at most {most}")
    if not bool(tokens.isfinite().all()):
        raise ConfigError(f"{name} holds NaN or infinity: look for what made it")
    if prompt is None:
        content = tokens.contiguous().view(torch.uint8).numpy().tobytes()
        prompt = f"embedding {hashlib.blake2b(content, digest_size=8).hexdigest()}"
    check_text("the prompt", prompt)
    bundle.given_embeddings[prompt] = tokens
    return prompt


def compute_dtype(given: LoadOptions, device: torch.device) -> torch.dtype:
    """Of the transformer, on that device where the options leave it open."""
    return getattr(torch, str(given.dtype or ("float32" if device.type == "cpu" else "bfloat16")))


def defaults_of(preset: str | None, name: str, bundle: ModelBundle) -> Preset:
    """The preset that is asked for, or the model's."""
    return PRESETS[preset or ("tiny" if name == "tiny" else bundle.facts.default_preset)]


def _dtype(name: Any) -> torch.dtype:
    """The dtype of a name, float32 of tf32."""
    return getattr(torch, "float32" if name == "tf32" else str(name))


def _check_preset(preset: str | None) -> None:
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {reprlib.repr(preset)}")


def _check_tf32(vae_dtype: Any, device: torch.device) -> None:
    if vae_dtype == "tf32" and device.type == "cpu":
        raise ConfigError("vae_dtype 'tf32' is for GPUs, and the device is a CPU: use float32")


def _prepared(bundle: ModelBundle, given: LoadOptions | ComponentsCall, device: torch.device) -> ModelBundle:
    """The model as the options have it compute."""
    set_tf32(bundle.vae, given.vae_dtype == "tf32")
    ops.require_attention(given.attention, device, bundle.dtype, bundle.transformer.config.head_dim)
    bundle.transformer.attention = given.attention
    if given.compile:
        bundle.transformer.compile()
    return bundle
