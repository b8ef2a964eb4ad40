#include "guidance_dots.h"

#include <algorithm>

#include "core/reductions.h"

namespace miga {
namespace {

constexpr int64_t kBlock = 1024;  // all buffers of a block stay in the first-level cache

template <typename T>
MIGA_INLINE void dots_of_run(const GuidanceRun<T>& run, const T* direction, int64_t size, T* dots) {
  std::fill_n(dots, 3, T(0));
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = std::min(kBlock, size - start), first = run.first_of_pass + start;
    T conditional[kBlock], unconditional[kBlock], difference[kBlock], along[kBlock] = {};
    const T* c = widen(run.velocity_cond, first, count, conditional);
    const T* u = widen(run.velocity_uncond, first, count, unconditional);
    for (int64_t i = 0; i < count; ++i) difference[i] = c[i] - u[i];
    add_term(along, direction[0], run.sample + start, count);
    add_term(along, direction[1], c, count);
    add_term(along, direction[2], u, count);
    dots[0] += sum_of_products(difference, along, count);
    dots[1] += sum_of_products(along, along, count);
    dots[2] += sum_of_products(difference, difference, count);
  }
}

}  // namespace

MIGA_CLONES void guidance_dots(const GuidanceRun<float>& run, const float* direction, int64_t size, float* dots) {
  dots_of_run(run, direction, size, dots);
}

MIGA_CLONES void guidance_dots(const GuidanceRun<double>& run, const double* direction, int64_t size, double* dots) {
  dots_of_run(run, direction, size, dots);
}

}  // namespace miga
