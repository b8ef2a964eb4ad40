"""Where the engine is a guest: what other programs and languages call."""
