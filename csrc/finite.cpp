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

constexpr std::size_t kWords = 16;
using Words = std::uint32_t __attribute__((vector_size(kWords * sizeof(std::uint32_t))));

// One search for all rows, and the last words of a row with what comes before them: a row is short.
BRC_VECTOR_CLONES bool copy_finite32(std::span<std::byte* const> to, const std::byte* from,
                                     std::size_t bytes) noexcept {
  Words largest{};
  for (std::byte* const row : to) {
    const auto copy = [&](std::size_t at) __attribute__((always_inline)) {
      Words words;
      std::memcpy(&words, from + at, sizeof(words));
      std::memcpy(row + at, &words, sizeof(words));
      words &= 0x7FFFFFFFu;
      largest = words > largest ? words : largest;
    };
    for (std::size_t at = 0; at + sizeof(Words) <= bytes; at += sizeof(Words)) copy(at);
    copy(bytes - sizeof(Words));
    from += bytes;
  }
  std::uint32_t word = 0;
  for (std::size_t i = 0; i < kWords; ++i) word = largest[i] > word ? largest[i] : word;
  return word < 0x7F800000u;
}

constexpr std::uint16_t infinity16(Kind kind) noexcept {
  return kind == Kind::float16 ? 0x7C00 : 0x7F80;
}

std::size_t item(Kind kind) noexcept {
  return kind == Kind::float32 ? 4 : 2;
}

}  // namespace

bool all_finite(Bytes values, Kind kind) noexcept {
  if (kind == Kind::integer) return true;
  const std::size_t count = values.size() / item(kind);
  if (kind == Kind::float32) return all_finite32(values.data(), count);
  return all_finite16(values.data(), count, infinity16(kind));
}

std::size_t first_not_finite(Bytes values, Kind kind) noexcept {
  if (kind == Kind::integer) return values.size();
  const std::size_t count = values.size() / item(kind);
  if (all_finite(values, kind)) return count;
  std::size_t i = 0;
  while (all_finite(values.subspan(i * item(kind), item(kind)), kind)) ++i;
  return i;
}

bool copy_finite(std::span<std::byte* const> to, const std::byte* from, std::size_t bytes,
                 Kind kind) noexcept {
  if (kind == Kind::float32 && bytes >= sizeof(Words)) return copy_finite32(to, from, bytes);
  const Bytes all{from, to.size() * bytes};
  for (std::size_t i = 0; i < to.size(); ++i) std::memcpy(to[i], from + i * bytes, bytes);
  return all_finite(all, kind);
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
