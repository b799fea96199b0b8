// The numbers that kernels read and write; all of them compute in float.
#pragma once

#include <bit>
#include <cstdint>

#include "vector_clones.hpp"

namespace brc {

struct BFloat16 {
  std::uint16_t bits;
};

BRC_INLINE float to_float(float x) {
  return x;
}

BRC_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// Rounds to the nearest, to the even one of two; NaN stays NaN.
template <class T>
BRC_INLINE T from_float(float x);

template <>
BRC_INLINE float from_float<float>(float x) {
  return x;
}

template <>
BRC_INLINE BFloat16 from_float<BFloat16>(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

}  // namespace brc
