#include "gelu.h"

#include <algorithm>
#include <bit>

#include "core/clones.h"

namespace miga {
namespace {

constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the former times an integer below 2⁸ is exact
constexpr float kRounder = 12582912.0f;                              // 1.5·2²³: what is added to it is rounded to an integer
constexpr float kLargest = 87.0f;                                    // eˣ is a normal float up to here, on either side

// eˣ for |x| ≤ 87: x = n·ln 2 + r, |r| ≤ ½·ln 2, and eʳ by its series, whose rest is below a tenth of an ulp.
MIGA_INLINE float exp_of(float x) {
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r * r + r + 1;
  const uint32_t power = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRounder) + 127u;
  return series * std::bit_cast<float>(power << 23);
}

}  // namespace

// ½·x·(1 + tanh u) = x/(1 + e⁻²ᵘ), u = √(2/π)·(x + 0.044715·x³). In two loops, or the compiler makes of each bound a second
// division.
MIGA_CLONES void gelu(float* x, int64_t size) {
  constexpr int64_t kBlock = 64;
  float exponents[kBlock];
  for (int64_t start = 0; start < size; start += kBlock) {
    float* __restrict block = x + start;
    const int64_t count = std::min(kBlock, size - start);
    for (int64_t i = 0; i < count; ++i) {
      const float exponent = block[i] * (-1.59576912f - 0.0713548163f * block[i] * block[i]);
      exponents[i] = std::max(std::min(exponent, kLargest), -kLargest);
    }
    for (int64_t i = 0; i < count; ++i) block[i] /= 1 + exp_of(exponents[i]);
  }
}

}  // namespace miga
