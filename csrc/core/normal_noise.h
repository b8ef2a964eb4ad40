// The noise of miga_engine.noise, free of torch.
#pragma once

#include <cstdint>

namespace miga {

// Where a frame's noise begins: all of Philox's state but the counter's first word, which counts the frame's elements by four.
struct NoiseState {
  uint32_t key[2];
  uint32_t counter[3];  // words 1, 2 and 3
};

// Standard normals of the frame's elements start ... start + size - 1; start is a multiple of 4.
void draw_normals(const NoiseState& state, int64_t start, int64_t size, float* out);

}  // namespace miga
