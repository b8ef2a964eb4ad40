// Mathematics of gelu_, free of torch.
#pragma once

#include <cstdint>

namespace miga {

// x ← GELU(x) in its tanh form, to 2e-7·|x|.
void gelu(float* x, int64_t size);

}  // namespace miga
