// What the replay store's methods share: the layout of a row's link, and the refusal of bad arguments.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>

#include "replay_columns.hpp"

namespace brc {

// The last word of a row, its link: two flags, and the side slot of the successor plus one (zero: no slot).
constexpr std::uint32_t kTerminated = 1u << 31;
constexpr std::uint32_t kTruncated = 1u << 30;
constexpr std::uint32_t kSlot = kTruncated - 1;

using std::to_string;

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

inline std::size_t require_size(const char* name, std::int64_t value, std::size_t largest) {
  if (value < 1) refuse(std::string(name) + " must be at least 1, got " + to_string(value));
  if (static_cast<std::size_t>(value) > largest) {
    refuse(std::string(name) + " must be at most " + to_string(largest) + ", got " + to_string(value));
  }
  return static_cast<std::size_t>(value);
}

inline void require_length(const char* name, std::size_t got, std::size_t wanted) {
  if (got != wanted)
    refuse(std::string(name) + " must hold " + to_string(wanted) + " values, got " + to_string(got));
}

template <bool Const>
void require_lengths(const TransitionColumns<Const>& columns, std::size_t rows, std::size_t successors,
                     std::size_t O, std::size_t A) {
  require_length("observations", columns.observations.size(), rows * O);
  require_length("actions", columns.actions.size(), rows * A);
  require_length("rewards", columns.rewards.size(), rows);
  require_length("terminated", columns.terminated.size(), rows);
  require_length("truncated", columns.truncated.size(), rows);
  require_length("successors", columns.successors.size(), successors * O);
}

/// Refuses a value that is not finite; `where(row)` says what a row of the column is. The scan vectorizes.
template <class Where>
void require_finite(const char* name, std::span<const float> values, std::size_t width, const Where& where) {
  const auto not_finite = [](float value) {
    return (std::bit_cast<std::uint32_t>(value) & 0x7F800000u) == 0x7F800000u;
  };
  std::uint32_t found = 0;
  for (const float value : values) found |= static_cast<std::uint32_t>(not_finite(value));
  if (found == 0) return;
  const auto first = std::find_if(values.begin(), values.end(), not_finite) - values.begin();
  refuse(std::string(name) + " of " + where(static_cast<std::size_t>(first) / width) +
         " must be finite, got " + to_string(values[static_cast<std::size_t>(first)]) +
         "; nothing was stored");
}

template <class Where>
void require_finite(const TransitionColumns<true>& columns, std::size_t O, std::size_t A,
                    const Where& where) {
  require_finite("observations", columns.observations, O, where);
  require_finite("actions", columns.actions, A, where);
  require_finite("rewards", columns.rewards, 1, where);
  require_finite("successors", columns.successors, O, where);
}

inline void copy(std::span<float> to, std::size_t index, const float* from, std::size_t width) {
  std::memcpy(to.data() + index * width, from, width * sizeof(float));
}

}  // namespace brc
