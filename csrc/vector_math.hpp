// exp, log and tanh of floats for the inside of plain loops: no branch, no table and no call, so that a
// compiler turns the loop into vector code. Errors are in units in the last place (ulp) of the result.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vector_clones.hpp"

namespace brc::vector_math {

// All bits or none.
BRC_INLINE std::uint32_t bits_where(bool holds) {
  return -static_cast<std::uint32_t>(holds);
}

// x with these bits set: NaN for all. Where sums may be reordered (-fassociative-math), x is computed as it
// stands, since a compiler cannot look through; and it is no choice, of which one would make a branch.
BRC_INLINE float with_bits(float x, std::uint32_t bits) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) | bits);
}

// e^x within 2 ulp, subnormal results too; 0 and infinity beyond them, and NaN for NaN.
// Source: Moshier, Cephes, expf: the polynomial.
BRC_INLINE float exp(float x) {
  const std::uint32_t nan = bits_where(x != x);
  // 0 is set, not computed, as some processors take long to round to it; NaN must become safe to round
  const std::uint32_t kept = bits_where(x > -104.0f);
  const float above = x > -104.0f ? x : 0.0f;
  const float clipped = above < 89.0f ? above : 89.0f;
  const float scaled = clipped * 1.44269504f;
  const auto n = static_cast<std::int32_t>(scaled + std::copysign(0.5f, scaled));
  const auto whole = static_cast<float>(n);
  // ln 2 in two parts, the first of few bits: its product is exact
  const float r = with_bits(clipped - whole * 0.693359375f, nan) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = 1.0f + (r + p * (r * r));
  const std::int32_t half = n >> 1;  // 2^n may have no exponent of its own: y gets it in two steps
  const float most = std::bit_cast<float>(std::bit_cast<std::int32_t>(y) + half * (1 << 23));
  const float out = most * std::bit_cast<float>((n - half + 127) << 23);
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(out) & kept) | nan);
}

// log x within 2 ulp for normal positive x, infinity for infinity and NaN for NaN and negative x; a subnormal
// x counts as 0, which gives -infinity.
// Source: Moshier, Cephes, logf: the polynomial.
BRC_INLINE float log(float x) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  const std::uint32_t nan = bits_where(x != x);
  const auto bits = std::bit_cast<std::uint32_t>(x);
  // x = 2^n m with m between sqrt(1/2) and sqrt(2)
  const std::int32_t n = static_cast<std::int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = std::bit_cast<float>(bits - (static_cast<std::uint32_t>(n) << 23)) - 1.0f;
  const auto whole = static_cast<float>(n);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  const float tail = with_bits(p * f * square - whole * 2.12194440e-4f, nan) - 0.5f * square;
  const float out = with_bits(f + tail, nan) + whole * 0.693359375f;
  const float finite = x < INFINITE ? out : x;  // NaN for NaN
  const float below = x < 0.0f ? std::numeric_limits<float>::quiet_NaN() : -INFINITE;
  return x < std::numeric_limits<float>::min() ? below : finite;
}

// tanh(x), its derivative, and -log(that) + log 4, without overflow; the derivative has a relative error of a
// few ulp, tanh an absolute one of an ulp of 1.
struct Tanh {
  float value;
  float slope;
  float steepness;
};

BRC_INLINE Tanh tanh(float x) {
  const float size = std::fabs(x);
  const float e = exp(-2.0f * size);
  const float d = 1.0f + e;
  const float value = (1.0f - e) / d;
  return {x < 0.0f ? -value : value, 4.0f * e / (d * d), 2.0f * (size + log(d))};
}

// A number that is greater for greater floats; its inverse is itself, read as a float. For maxima, of which a
// compiler makes vector code for integers only where NaN counts: a positive NaN is greater than all floats,
// a negative one less.
BRC_INLINE std::int32_t ordered(std::int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

BRC_INLINE float maximum(const float* x, std::int64_t count) {
  std::int32_t most = INT32_MIN;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t value = ordered(std::bit_cast<std::int32_t>(x[i]));
    most = value > most ? value : most;
  }
  return std::bit_cast<float>(ordered(most));
}

}  // namespace brc::vector_math
