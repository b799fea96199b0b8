// Search for values that are not finite.
#pragma once

#include <cstddef>
#include <span>

#include "replay_layout.hpp"

namespace brc {

/// Index of the first element that is NaN or infinite, or the number of elements. O(bytes), vectorized.
[[nodiscard]] std::size_t first_not_finite(Bytes values, Kind kind) noexcept;

/// Whether all elements are finite; integers are. O(bytes), vectorized.
[[nodiscard]] bool all_finite(Bytes values, Kind kind) noexcept;

/// Copies rows of `bytes` each, one after the other in `from`, to `to` [R], whether they are finite or not,
/// and says whether all are. O(bytes), vectorized.
[[nodiscard]] bool copy_finite(std::span<std::byte* const> to, const std::byte* from, std::size_t bytes,
                               Kind kind) noexcept;

/// The element at `index` of values of a floating kind.
[[nodiscard]] float value_at(Bytes values, Kind kind, std::size_t index) noexcept;

}  // namespace brc
