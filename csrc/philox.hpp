// Philox4x32-10, a counter-based random number generator (Salmon et al. 2011, "Parallel Random Numbers: As
// Easy as 1, 2, 3", section 3.3), and unbiased bounded integers from it (Lemire 2019, arXiv:1805.10941).
//
// A draw is a pure function of (seed, draw, index): it depends on no earlier draw, batch shape or thread.
#pragma once

#include <array>
#include <cstdint>

namespace brc {

/// Ten rounds of Philox4x32: 128 random bits for a counter under a key.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                                std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
  }
  return counter;
}

/// Four random words: those of one attempt at elements 4 quad to 4 quad + 3 of draw number `draw` under
/// `seed`.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> draw_words(std::uint64_t seed, std::uint64_t draw,
                                                                std::uint32_t quad,
                                                                std::uint32_t attempt) noexcept {
  return philox4x32({static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(draw >> 32), quad, attempt},
                    {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}

/// Turns a random word into an integer below `bound` >= 1, or rejects it with a probability below bound /
/// 2^32, so that every integer is equally likely.
class BoundedDraw {
 public:
  explicit constexpr BoundedDraw(std::uint32_t bound) noexcept
      : bound_(bound), rejected_below_((0u - bound) % bound) {}
  [[nodiscard]] constexpr bool operator()(std::uint32_t word, std::uint32_t& value) const noexcept {
    const std::uint64_t product = std::uint64_t{word} * bound_;
    value = static_cast<std::uint32_t>(product >> 32);
    return static_cast<std::uint32_t>(product) >= rejected_below_;
  }

 private:
  std::uint32_t bound_;
  std::uint32_t rejected_below_;
};

}  // namespace brc
