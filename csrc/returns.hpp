// Discounted returns of finished episodes.
#pragma once

#include <cstdint>
#include <span>

namespace brc {

/// Rewards of N running episodes, [L, N]: row t holds step t of each.
struct Episodes {
  std::span<const double> rewards;
  std::size_t slots;  // N
  double discount;
};

/// Extremes of the returns from every step of some episodes: G[t] = r[t] + discount * G[t+1], where
/// G[length] = bootstrap + mean_weight * (mean of the episode's rewards).
///
/// slots, lengths, bootstraps, mean_weights, low, high: [M], an episode each; lengths in 1..L, slots below N.
/// Throws std::out_of_range, before anything is written, for another length or slot. O(sum of lengths).
void return_extremes(const Episodes& episodes, std::span<const std::int64_t> slots,
                     std::span<const std::int64_t> lengths, std::span<const double> bootstraps,
                     std::span<const double> mean_weights, std::span<double> low, std::span<double> high);

}  // namespace brc
