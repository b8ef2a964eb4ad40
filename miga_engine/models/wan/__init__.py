"""The Wan2.1 family: transformer, video VAE, text encoder, tokenizer."""
