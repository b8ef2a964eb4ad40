"""Networks and how to load them."""

from miga_engine.models.bundle import ModelBundle
from miga_engine.models.loading import load_bundle, load_text_encoder, load_tokenizer, load_transformer, load_vae

__all__ = ["ModelBundle", "load_bundle", "load_text_encoder", "load_tokenizer", "load_transformer", "load_vae"]
