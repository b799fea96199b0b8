// Search for values that are not finite.
#pragma once

#include <cstddef>

#include "replay_layout.hpp"

namespace brc {

/// Index of the first element that is NaN or infinite, or the number of elements. O(bytes), vectorized.
[[nodiscard]] std::size_t first_not_finite(Bytes values, Kind kind) noexcept;

/// The element at `index` of values of a floating kind.
[[nodiscard]] float value_at(Bytes values, Kind kind, std::size_t index) noexcept;

}  // namespace brc
