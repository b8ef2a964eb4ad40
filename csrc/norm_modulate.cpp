#include "norm_modulate.h"

#include <algorithm>
#include <cmath>

#include "core/reductions.h"

namespace miga {
namespace {

template <typename T>
MIGA_INLINE void add(T* __restrict x, ConstElements y, const T* gate, int64_t width, T* scratch) {
  const T* values = widen(y, 0, width, scratch);
  if (gate == nullptr) {
    for (int64_t i = 0; i < width; ++i) x[i] += values[i];
  } else {
    for (int64_t i = 0; i < width; ++i) x[i] += gate[i] * values[i];
  }
}

template <typename T, typename E>
MIGA_INLINE void write(const T* x, const T* weight, const T* bias, T eps, int64_t width, E* __restrict out) {
  if (weight == nullptr) {
    for (int64_t i = 0; i < width; ++i) out[i] = narrow<E>(x[i]);
    return;
  }
  const T count = static_cast<T>(width);
  const T center = sum(x, width) / count;
  const Deviations<T> from_center = deviations(x, center, width);
  const T shift = from_center.sum / count;  // what rounding left between the center and the mean
  const T variance = std::max(T(0), from_center.squares / count - shift * shift);
  const T scale = 1 / std::sqrt(variance + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = narrow<E>((x[i] - center - shift) * scale * weight[i] + bias[i]);
}

template <typename T>
MIGA_INLINE void write(const T* x, const T* weight, const T* bias, T eps, int64_t width, Elements out) {
  switch (out.type) {
    case ElementType::kFloat:
      return write(x, weight, bias, eps, width, static_cast<float*>(out.data));
    case ElementType::kDouble:
      return write(x, weight, bias, eps, width, static_cast<double*>(out.data));
    case ElementType::kHalf:
      return write(x, weight, bias, eps, width, static_cast<Half*>(out.data));
    case ElementType::kBFloat16:
      return write(x, weight, bias, eps, width, static_cast<BFloat16*>(out.data));
  }
}

}  // namespace

MIGA_CLONES void add_gated(float* x, ConstElements y, const float* gate, int64_t width, float* scratch) {
  add(x, y, gate, width, scratch);
}

MIGA_CLONES void add_gated(double* x, ConstElements y, const double* gate, int64_t width, double* scratch) {
  add(x, y, gate, width, scratch);
}

MIGA_CLONES void norm_modulate(
    const float* x, const float* weight, const float* bias, float eps, int64_t width, Elements out) {
  write(x, weight, bias, eps, width, out);
}

MIGA_CLONES void norm_modulate(
    const double* x, const double* weight, const double* bias, double eps, int64_t width, Elements out) {
  write(x, weight, bias, eps, width, out);
}

}  // namespace miga
