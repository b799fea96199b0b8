#include "priorities.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "philox.hpp"
#include "replay_layout.hpp"

namespace brc {

namespace {

double require_alpha(double alpha) {
  if (alpha >= 0.0 && std::isfinite(alpha)) return alpha;
  refuse("alpha must be finite and not negative, got " + to_string(alpha));
}

}  // namespace

Priorities::Priorities(std::size_t cells, double alpha)
    : tree_(cells),
      values_(cells),
      alpha_(require_alpha(alpha)),
      most_(static_cast<float>(
          std::min<double>(std::numeric_limits<float>::max(), std::pow(SumTree::kMost, 1.0 / alpha)))) {}

void Priorities::require(float priority) const {
  if (!(priority >= 0.0f && std::isfinite(priority))) {
    refuse("priorities must be finite and not negative, got " + to_string(priority));
  }
  if (priority > most_) {
    refuse("priorities must be at most " + to_string(most_) + " with alpha " + to_string(alpha_) + ", got " +
           to_string(priority));
  }
}

double Priorities::power(float priority) const noexcept {
  if (priority == 0.0f) return 0.0;
  return std::clamp(std::pow(static_cast<double>(priority), alpha_), SumTree::kLeast, SumTree::kMost);
}

void Priorities::set(std::size_t cell, float priority) noexcept {
  const double own = power(priority);
  put(cell, priority, own);
  if (priority > largest_) {
    largest_ = priority;
    largest_power_ = own;
  }
}

void Priorities::rotate(std::size_t first, std::size_t count, std::size_t begin) noexcept {
  const auto cells = values_.begin() + static_cast<std::ptrdiff_t>(first);
  std::rotate(cells, cells + static_cast<std::ptrdiff_t>(begin), cells + static_cast<std::ptrdiff_t>(count));
  for (std::size_t cell = first; cell < first + count; ++cell) put(cell, values_[cell], power(values_[cell]));
}

void Priorities::clear(float largest) noexcept {
  ++version_;
  tree_.clear();
  std::ranges::fill(values_, 0.0f);
  largest_ = largest;
  largest_power_ = power(largest);
}

void Priorities::draw(std::uint64_t seed, std::uint64_t draw, std::size_t first,
                      std::span<std::uint32_t> cells) const noexcept {
  std::array<double, 256> points;
  std::array<std::uint32_t, 4> words{};
  for (std::size_t begin = 0; begin < cells.size(); begin += points.size()) {
    const std::size_t count = std::min(points.size(), cells.size() - begin);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t element = first + begin + i;
      const std::size_t word = 2 * (element % 2);
      if (i == 0 || word == 0) words = draw_words(seed, draw, static_cast<std::uint32_t>(element / 2), 0);
      const auto bits = (std::uint64_t{words[word]} << 32 | words[word + 1]) >> 11;
      points[i] = static_cast<double>(bits) * 0x1p-53 * tree_.total();
    }
    tree_.find(std::span(points).first(count), cells.subspan(begin, count));
  }
}

void weigh(std::span<const double> shares, double beta, std::span<float> out) noexcept {
  const double least = *std::ranges::min_element(shares);
  for (std::size_t i = 0; i < shares.size(); ++i)
    out[i] = static_cast<float>(std::pow(least / shares[i], beta));
}

}  // namespace brc
