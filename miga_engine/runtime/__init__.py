"""window_plan decides in integers, frame_queue and denoise move tensors, stages and reflection join them."""
