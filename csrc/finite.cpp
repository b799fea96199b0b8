#include "finite.hpp"

#include <cstdint>
#include <cstring>
#include <limits>

#include "vector_clones.hpp"

namespace brc {
namespace {

// Without their signs, the bits of floats are in the order of their values, and NaN comes after infinity.
BRC_VECTOR_CLONES bool all_finite32(const std::byte* data, std::size_t count) noexcept {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t word;
    std::memcpy(&word, data + i * sizeof(word), sizeof(word));
    word &= 0x7FFFFFFFu;
    largest = word > largest ? word : largest;
  }
  return largest < 0x7F800000u;
}

BRC_VECTOR_CLONES bool all_finite16(const std::byte* data, std::size_t count,
                                    std::uint16_t infinity) noexcept {
  std::uint16_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t word;
    std::memcpy(&word, data + i * sizeof(word), sizeof(word));
    word &= 0x7FFF;
    largest = word > largest ? word : largest;
  }
  return largest < infinity;
}

constexpr std::uint16_t infinity16(Kind kind) noexcept {
  return kind == Kind::float16 ? 0x7C00 : 0x7F80;
}

std::size_t item(Kind kind) noexcept {
  return kind == Kind::float32 ? 4 : 2;
}

bool finite(Bytes values, Kind kind) noexcept {
  const std::size_t count = values.size() / item(kind);
  if (kind == Kind::float32) return all_finite32(values.data(), count);
  return all_finite16(values.data(), count, infinity16(kind));
}

}  // namespace

std::size_t first_not_finite(Bytes values, Kind kind) noexcept {
  if (kind == Kind::integer) return values.size();
  const std::size_t count = values.size() / item(kind);
  if (finite(values, kind)) return count;
  std::size_t i = 0;
  while (finite(values.subspan(i * item(kind), item(kind)), kind)) ++i;
  return i;
}

float value_at(Bytes values, Kind kind, std::size_t index) noexcept {
  std::uint32_t bits = 0;
  std::memcpy(&bits, values.data() + index * item(kind), item(kind));
  if (kind == Kind::bfloat16) bits <<= 16;
  if (kind == Kind::float16) {  // used for messages about NaN and infinity alone
    if ((bits & 0x7C00u) != 0x7C00u) return 0.0f;
    bits = (bits & 0x8000u) << 16 | 0x7F800000u | (bits & 0x3FFu) << 13;
  }
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace brc
