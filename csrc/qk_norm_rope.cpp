#include "qk_norm_rope.h"

#include <algorithm>
#include <cmath>

#include "core/reductions.h"

namespace miga {
namespace {

template <typename T>
MIGA_INLINE void expand(
    const T* cosines, const T* sines, int64_t num_pairs, T* __restrict cos, T* __restrict sin) {
  for (int64_t p = 0; p < num_pairs; ++p) {
    cos[2 * p] = cosines[p];
    cos[2 * p + 1] = cosines[p];
    sin[2 * p] = -sines[p];
    sin[2 * p + 1] = sines[p];
  }
}

template <typename T>
MIGA_INLINE const T* normalize(const T* x, const T* weight, T eps, int64_t width, T* __restrict out) {
  const T scale = 1 / std::sqrt(sum_of_squares(x, width) / static_cast<T>(width) + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
  return out;
}

template <typename T, typename E>
MIGA_INLINE void rotate(const T* x, const T* cos, const T* sin, int64_t num_heads, int64_t head_width, E* __restrict out) {
  for (int64_t head = 0; head < num_heads; ++head, x += head_width, out += head_width) {
    for (int64_t i = 0; i < head_width; i += 2) {
      out[i] = narrow<E>(x[i] * cos[i] + x[i + 1] * sin[i]);
      out[i + 1] = narrow<E>(x[i + 1] * cos[i + 1] + x[i] * sin[i + 1]);
    }
  }
}

template <typename T, typename E>
MIGA_INLINE void update(
    E* row, ElementType type, const T* weight, const T* cos, const T* sin, int64_t num_heads, int64_t head_width, T eps,
    T* scratch) {
  const int64_t width = num_heads * head_width;
  const T* x = widen({row, type}, 0, width, scratch);
  if (weight != nullptr) {
    x = normalize(x, weight, eps, width, scratch + width);
  } else if (x != scratch) {
    x = std::copy_n(x, width, scratch) - width;  // a rotation in place would not vectorise
  }
  if (cos != nullptr) {
    rotate(x, cos, sin, num_heads, head_width, row);
  } else {
    for (int64_t i = 0; i < width; ++i) row[i] = narrow<E>(x[i]);
  }
}

template <typename T>
MIGA_INLINE void update(
    Elements row, const T* weight, const T* cos, const T* sin, int64_t num_heads, int64_t head_width, T eps, T* scratch) {
  switch (row.type) {
    case ElementType::kFloat:
      return update(static_cast<float*>(row.data), row.type, weight, cos, sin, num_heads, head_width, eps, scratch);
    case ElementType::kDouble:
      return update(static_cast<double*>(row.data), row.type, weight, cos, sin, num_heads, head_width, eps, scratch);
    case ElementType::kHalf:
      return update(static_cast<Half*>(row.data), row.type, weight, cos, sin, num_heads, head_width, eps, scratch);
    case ElementType::kBFloat16:
      return update(static_cast<BFloat16*>(row.data), row.type, weight, cos, sin, num_heads, head_width, eps, scratch);
  }
}

}  // namespace

MIGA_CLONES void norm_rotate(
    Elements row, const float* weight, const float* cos, const float* sin, int64_t num_heads, int64_t head_width, float eps,
    float* scratch) {
  update(row, weight, cos, sin, num_heads, head_width, eps, scratch);
}

MIGA_CLONES void norm_rotate(
    Elements row, const double* weight, const double* cos, const double* sin, int64_t num_heads, int64_t head_width, double eps,
    double* scratch) {
  update(row, weight, cos, sin, num_heads, head_width, eps, scratch);
}

MIGA_CLONES void expand_pairs(const float* cosines, const float* sines, int64_t num_pairs, float* cos, float* sin) {
  expand(cosines, sines, num_pairs, cos, sin);
}

MIGA_CLONES void expand_pairs(const double* cosines, const double* sines, int64_t num_pairs, double* cos, double* sin) {
  expand(cosines, sines, num_pairs, cos, sin);
}

}  // namespace miga
