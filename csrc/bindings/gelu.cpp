// Registers gelu_ (miga_engine/ops/gelu.py: schema, fake), spread over threads.
#include <torch/csrc/stable/library.h>

#include "core/tensors.h"
#include "gelu.h"

namespace miga {
namespace {

// x of float32, contiguous.
void gelu_elements(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "x is strided, expected a contiguous tensor");
  float* data = x.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, x.numel(), kGrainElements, [&](int64_t begin, int64_t end) { gelu(data + begin, end - begin); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(miga, CPU, m) {
  m.impl("gelu_", TORCH_BOX(&gelu_elements));
}

}  // namespace miga
