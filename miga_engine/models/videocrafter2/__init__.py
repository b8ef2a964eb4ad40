"""The VideoCrafter2 family: 3-D UNet, image VAE, text encoder, tokenizer."""
