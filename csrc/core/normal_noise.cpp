#include "core/normal_noise.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/clones.h"

namespace miga {
namespace {

constexpr int64_t kCounters = 128;  // of a block, whose buffers stay in the first-level cache
constexpr double kTwoPi = 0x1.921fb54442d18p+2;
// Sums of two parts: few enough bits in the first for exact multiples by the integers that occur.
constexpr double kHalfPi[] = {0x1.921fb54442000p+0, 0x1.a308d313198a0p-41};
constexpr double kLn2[] = {0x1.62e42fefa2000p-1, 0x1.9ef35793c7673p-41};
constexpr uint64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;

// Polynomials through Chebyshev nodes, lowest power first, of z = s² in (2·atanh(s)/s - 2)/z for |s| ≤ 3 - 2√2, and of z = r² in
// (sin(r)/r - 1)/z and (cos(r) - 1 + z/2)/z² for |r| ≤ π/4; each adds less than 2⁻⁵⁵ to the relative error.
constexpr double kLog[] = {0x1.5555555555558p-1, 0x1.99999999952d7p-2, 0x1.2492492df281ap-2, 0x1.c71c62e3f11e6p-3,
                           0x1.7462b51cb66b1p-3, 0x1.39fe51a7c18f9p-3, 0x1.2b5900de53b32p-3};
constexpr double kSin[] = {-0x1.5555555555555p-3, 0x1.1111111110bb2p-7,  -0x1.a01a019e83816p-13,
                           0x1.71de379654304p-19, -0x1.ae600aca92c64p-26, 0x1.5e0b05bff20f2p-33};
constexpr double kCos[] = {0x1.5555555555555p-5,   -0x1.6c16c16c16967p-10, 0x1.a01a019f4e9b4p-16,
                           -0x1.27e4fa17bf139p-22, 0x1.1eeb68cd22f56p-29,  -0x1.907d8f29fe831p-37};

template <int kCount>
MIGA_INLINE double polynomial(const double (&coefficients)[kCount], double z) {
  double value = coefficients[kCount - 1];
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) value = value * z + coefficients[i];
  return value;
}

// An integer below 2⁵² as double.
MIGA_INLINE double to_double(uint64_t value) { return std::bit_cast<double>(value | 0x4330000000000000u) - 0x1p52; }

// (word + ½)·2⁻³², exactly: written behind the point of 1.0.
MIGA_INLINE double to_uniform(uint32_t word) {
  const uint64_t fraction = static_cast<uint64_t>(word) << 20 | 1u << 19;
  return std::bit_cast<double>(fraction | 0x3ff0000000000000u) - 1;
}

// ln x for a normal x in (0, 1) within about 1 ulp: x = m·2⁻ᵏ, √½ ≤ m < √2, f = m - 1, s = f/(2 + f), ln m = 2·atanh(s).
MIGA_INLINE double log_of(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint64_t k = (kSqrtHalfBits + (uint64_t{1} << 52) - 1 - bits) >> 52;
  const double f = std::bit_cast<double>(bits + (k << 52)) - 1;
  const double exponent = to_double(k);
  const double s = f / (2 + f);
  const double z = s * s;
  const double half_square = 0.5 * f * f;
  // f - f²/2 is nearly all of it, and s·(f²/2 + R) is small: the roundings of what is small hardly matter.
  const double rest = s * (half_square + z * polynomial(kLog, z));
  return (f - (half_square - (rest - exponent * kLn2[1]))) - exponent * kLn2[0];
}

// words 0 ... 3 of Philox4x32-10 for the counters first ... first + size - 1.
MIGA_INLINE void philox(const NoiseState& state, uint32_t first, int64_t size, uint32_t (*__restrict words)[kCounters]) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t c0 = first + static_cast<uint32_t>(i), c1 = state.counter[0], c2 = state.counter[1], c3 = state.counter[2];
    uint32_t k0 = state.key[0], k1 = state.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

// √(-2 ln u₀)·(cos 2πu₁, sin 2πu₁)
MIGA_INLINE void box_muller(
    const uint32_t* words0, const uint32_t* words1, int64_t size, float* __restrict first, float* __restrict second) {
  for (int64_t i = 0; i < size; ++i) {
    const double radius = std::sqrt(-2 * log_of(to_uniform(words0[i])));
    const double angle = to_uniform(words1[i]) * kTwoPi;
    const uint64_t quarter = (static_cast<uint64_t>(words1[i]) + (1u << 29)) >> 30;  // the nearest multiple of π/2
    const double turns = to_double(quarter);
    const double r = (angle - turns * kHalfPi[0]) - turns * kHalfPi[1];
    const double z = r * r;
    const double sine = r + r * z * polynomial(kSin, z);
    const double cosine = 1 - (0.5 * z - z * z * polynomial(kCos, z));
    const uint64_t cosine_bits = std::bit_cast<uint64_t>(cosine), sine_bits = std::bit_cast<uint64_t>(sine);
    // An odd quarter swaps the two, and every quarter turn changes one sign.
    const uint64_t swap = (cosine_bits ^ sine_bits) & (0 - (quarter & 1));
    const uint64_t x = cosine_bits ^ swap ^ ((quarter + 1) & 2) << 62;
    const uint64_t y = sine_bits ^ swap ^ (quarter & 2) << 62;
    first[i] = static_cast<float>(radius * std::bit_cast<double>(x));
    second[i] = static_cast<float>(radius * std::bit_cast<double>(y));
  }
}

}  // namespace

MIGA_CLONES void draw_normals(const NoiseState& state, int64_t start, int64_t size, float* out) {
  uint32_t words[4][kCounters];
  float normals[4][kCounters], interleaved[kCounters][4];
  const int64_t block_size = 4 * kCounters;
  for (int64_t done = 0; done < size; done += block_size) {
    const int64_t count = std::min(block_size, size - done);
    // A last block in part is drawn whole, so that all loops are of constant length.
    philox(state, static_cast<uint32_t>((start + done) / 4), kCounters, words);
    box_muller(words[0], words[1], kCounters, normals[0], normals[1]);
    box_muller(words[2], words[3], kCounters, normals[2], normals[3]);
    for (int64_t i = 0; i < kCounters; ++i)
      for (int64_t j = 0; j < 4; ++j) interleaved[i][j] = normals[j][i];
    std::copy_n(interleaved[0], count, out + done);
  }
}

}  // namespace miga
