#include "returns.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace brc {

void return_extremes(const Episodes& episodes, std::span<const std::int64_t> slots,
                     std::span<const std::int64_t> lengths, std::span<const double> bootstraps,
                     std::span<const double> mean_weights, std::span<double> low, std::span<double> high) {
  const std::size_t width = episodes.slots, rows = width == 0 ? 0 : episodes.rewards.size() / width;
  if (slots.empty()) return;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const auto slot = static_cast<std::size_t>(slots[i]), length = static_cast<std::size_t>(lengths[i]);
    if (slot >= width || length < 1 || length > rows) throw std::out_of_range("no such episode");
  }
  // Step by step and not episode by episode: neighbours in a row share cache lines.
  const auto longest = static_cast<std::size_t>(*std::ranges::max_element(lengths));
  std::vector<double> values(slots.size());
  for (std::size_t t = 0; t < longest; ++t) {
    const double* row = episodes.rewards.data() + t * width;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (t < static_cast<std::size_t>(lengths[i])) values[i] += row[slots[i]];
    }
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    values[i] = bootstraps[i] + mean_weights[i] * (values[i] / static_cast<double>(lengths[i]));
    low[i] = std::numeric_limits<double>::infinity();
    high[i] = -low[i];
  }
  for (std::size_t t = longest; t-- > 0;) {
    const double* row = episodes.rewards.data() + t * width;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      if (t >= static_cast<std::size_t>(lengths[i])) continue;
      values[i] = row[slots[i]] + episodes.discount * values[i];
      low[i] = std::min(low[i], values[i]);
      high[i] = std::max(high[i], values[i]);
    }
  }
}

}  // namespace brc
