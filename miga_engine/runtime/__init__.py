"""window_plan decides in integers, frame_store and denoise move tensors, stages and reflection join them."""
