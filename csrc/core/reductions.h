// Sums whose order is the same whatever the width of the vectors, so that every clone gives the same bits.
#pragma once

#include <cstdint>

#include "core/clones.h"

namespace miga {

constexpr int64_t kSumLanes = 32;  // independent accumulators: the sum vectorises without reassociating

template <int64_t kHalf = kSumLanes / 2, typename T>
MIGA_INLINE T add_lanes(T* lanes) {
  for (int64_t j = 0; j < kHalf; ++j) lanes[j] += lanes[j + kHalf];
  if constexpr (kHalf > 1) return add_lanes<kHalf / 2>(lanes);
  return lanes[0];
}

template <typename T>
MIGA_INLINE T sum(const T* values, int64_t size) {
  T lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes)
    for (int64_t j = 0; j < kSumLanes; ++j) lanes[j] += values[i + j];
  for (int64_t j = 0; i + j < size; ++j) lanes[j] += values[i + j];
  return add_lanes(lanes);
}

template <typename T>
MIGA_INLINE T sum_of_products(const T* a, const T* b, int64_t size) {
  T lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes)
    for (int64_t j = 0; j < kSumLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  for (int64_t j = 0; i + j < size; ++j) lanes[j] += a[i + j] * b[i + j];
  return add_lanes(lanes);
}

template <typename T>
MIGA_INLINE T sum_of_squares(const T* values, int64_t size) {
  return sum_of_products(values, values, size);
}

// To each sum; a term with coefficient 0 is left out, so what it points to is never read.
template <typename T>
MIGA_INLINE void add_term(T* sums, T coefficient, const T* values, int64_t size) {
  if (coefficient == 0) return;
  for (int64_t i = 0; i < size; ++i) sums[i] += coefficient * values[i];
}

template <typename T>
struct Deviations {
  T sum, squares;
};

// Of values - center.
template <typename T>
MIGA_INLINE Deviations<T> deviations(const T* values, T center, int64_t size) {
  T sums[kSumLanes] = {}, squares[kSumLanes] = {};
  const auto add = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
    const T deviation = values[i + j] - center;
    sums[j] += deviation;
    squares[j] += deviation * deviation;
  };
  int64_t i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes)
    for (int64_t j = 0; j < kSumLanes; ++j) add(i, j);
  for (int64_t j = 0; i + j < size; ++j) add(i, j);
  return {add_lanes(sums), add_lanes(squares)};
}

}  // namespace miga
