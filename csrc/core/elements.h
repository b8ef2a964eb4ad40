// Floating point types as they lie in memory. Arithmetic is in float or double (T below); reading and writing the 16-bit types is
// integer code that vectorises on every processor. Writing rounds to nearest, ties to even; NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "core/clones.h"

namespace miga {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

MIGA_INLINE float to_float(float value) { return value; }
MIGA_INLINE float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

MIGA_INLINE float to_float(Half value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  // Exponent bias 15 -> 127; infinity and NaN -> the largest exponent.
  const uint32_t normal = magnitude + (magnitude >= 0x0f800000u ? 224u << 23 : 112u << 23);
  // A subnormal's bits are the fraction of 2^-14: 1.fraction - 1.
  const float subnormal = std::bit_cast<float>(magnitude + (113u << 23)) - std::bit_cast<float>(113u << 23);
  return std::bit_cast<float>((magnitude < 1u << 23 ? std::bit_cast<uint32_t>(subnormal) : normal) | sign);
}

template <typename E>
MIGA_INLINE E from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if constexpr (std::is_same_v<E, float>) {
    return value;
  } else if constexpr (std::is_same_v<E, BFloat16>) {
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return {static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fc0u | sign : rounded)};
  } else {
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Added to 0.5, whose last bit is a half's smallest subnormal, the value is rounded to a multiple of it.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
    const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN; infinity, also for what is above 65504
    return {static_cast<uint16_t>((magnitude >= 143u << 23 ? special : finite) | sign)};
  }
}

// A row of elements of any type.
struct ConstElements {
  const void* data;
  ElementType type;
};

struct Elements {
  void* data;
  ElementType type;
};

template <typename E, typename T>
MIGA_INLINE void widen_all(const E* from, int64_t size, T* buffer) {
  for (int64_t i = 0; i < size; ++i) buffer[i] = static_cast<T>(to_float(from[i]));
}

// Elements start ... start + size - 1 as T: themselves where they are T already, otherwise copied to the buffer.
template <typename T>
MIGA_INLINE const T* widen(ConstElements from, int64_t start, int64_t size, T* buffer) {
  switch (from.type) {
    case ElementType::kFloat:
      if constexpr (std::is_same_v<T, float>) return static_cast<const float*>(from.data) + start;
      widen_all(static_cast<const float*>(from.data) + start, size, buffer);
      break;
    case ElementType::kDouble: {
      const double* wide = static_cast<const double*>(from.data) + start;
      if constexpr (std::is_same_v<T, double>) return wide;
      for (int64_t i = 0; i < size; ++i) buffer[i] = static_cast<T>(wide[i]);
      break;
    }
    case ElementType::kHalf:
      widen_all(static_cast<const Half*>(from.data) + start, size, buffer);
      break;
    case ElementType::kBFloat16:
      widen_all(static_cast<const BFloat16*>(from.data) + start, size, buffer);
      break;
  }
  return buffer;
}

// A value of T as an element of type E; double goes to the 16-bit types by way of float, as in torch.
template <typename E, typename T>
MIGA_INLINE E narrow(T value) {
  if constexpr (std::is_same_v<E, double>) {
    return value;
  } else {
    return from_float<E>(static_cast<float>(value));
  }
}

}  // namespace miga
