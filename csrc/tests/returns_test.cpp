// Extremes of returns against each return by its own sum.
#include "returns.hpp"

#include <limits>
#include <stdexcept>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

constexpr double DISCOUNT = 0.97;

void episodes_of_any_length() {
  const std::int64_t rows = 40, width = 7;
  Doubles rewards(index(rows * width));
  for (double& reward : rewards) reward = normal(1)[0];
  const std::vector<std::int64_t> slots = {6, 0, 3}, lengths = {40, 1, 17};
  const Doubles bootstraps = {0.0, 5.0, -2.0}, weights = {0.0, 0.0, 1.0 / (1.0 - DISCOUNT)};
  Doubles low(3), high(3);
  brc::return_extremes({rewards, index(width), DISCOUNT}, slots, lengths, bootstraps, weights, low, high);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    double mean = 0.0, least = std::numeric_limits<double>::infinity(), most = -least;
    for (std::int64_t t = 0; t < lengths[i]; ++t) {
      mean += rewards[index(t * width + slots[i])] / static_cast<double>(lengths[i]);
    }
    for (std::int64_t from = 0; from < lengths[i]; ++from) {
      double sum = 0.0, power = 1.0;
      for (std::int64_t t = from; t < lengths[i]; ++t, power *= DISCOUNT) {
        sum += power * rewards[index(t * width + slots[i])];
      }
      sum += power * (bootstraps[i] + weights[i] * mean);
      least = std::min(least, sum);
      most = std::max(most, sum);
    }
    expect(std::abs(low[i] - least) < 1e-9 && std::abs(high[i] - most) < 1e-9, "extremes", lengths[i]);
  }
}

void what_is_no_episode_is_refused() {
  const Doubles rewards(12), zeros(1);
  for (const auto& [slot, length] : {std::pair{3, 1}, {-1, 1}, {0, 0}, {0, 5}, {0, -1}}) {
    Doubles low(1, 7.0), high(1, 7.0);
    const std::vector<std::int64_t> slots = {slot}, lengths = {length};
    bool refused = false;
    try {
      brc::return_extremes({rewards, 3, DISCOUNT}, slots, lengths, zeros, zeros, low, high);
    } catch (const std::out_of_range&) {
      refused = true;
    }
    expect(refused && low[0] == 7.0 && high[0] == 7.0, "a refusal", length);
  }
}

}  // namespace

int main() {
  episodes_of_any_length();
  what_is_no_episode_is_refused();
}
