"""The runtime: decides in integers (window_plan), moves tensors (frame_queue, denoise), joins them (stages, reflection)."""
