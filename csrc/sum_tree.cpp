#include "sum_tree.hpp"

#include <limits>

namespace brc {
namespace {

using Eight = std::array<double, 8>;

/// The sums up to and with each of eight. None is smaller than the one before it, and what a zero is added to
/// stays the same: each is a sum of the parts of the one before and of one more.
Eight sums_up_to(const Eight& v) noexcept {
  const double a = v[0] + v[1], b = v[2] + v[3], c = v[4] + v[5], d = v[6] + v[7];
  const double half = a + b;
  return {v[0], a, a + v[2], half, half + v[4], half + c, half + (c + v[6]), half + (c + d)};
}

double sum(const Eight& v) noexcept {
  return sums_up_to(v)[7];
}

constexpr double kBelow = 1.0 - std::numeric_limits<double>::epsilon() / 2;  // times x: below x, and the next

}  // namespace

SumTree::SumTree(std::size_t leaves) {
  std::size_t count = 0;
  do {
    leaves = (leaves + kWidth - 1) / kWidth;
    first_.push_back(count);
    count += leaves;
  } while (leaves > 1);
  nodes_.resize(count);
}

void SumTree::settle() noexcept {
  for (std::size_t level = 0; level + 1 < first_.size(); ++level) {
    const Node* const here = nodes_.data() + first_[level];
    Node* const above = nodes_.data() + first_[level + 1];
    if (nodes(level) <= changes_) {  // all of them are no more, and each comes once
      for (std::size_t node = 0; node < nodes(level); ++node)
        above[node / kWidth][node % kWidth] = sum(here[node]);
      changes_ = nodes(level + 1);
      for (std::size_t node = 0; node < changes_; ++node) changed_[node] = static_cast<std::uint32_t>(node);
      continue;
    }
    std::size_t further = 0;
    for (std::size_t i = 0; i < changes_; ++i) {
      const std::uint32_t node = changed_[i];
      above[node / kWidth][node % kWidth] = sum(here[node]);
      if (further == 0 || changed_[further - 1] != node / kWidth) changed_[further++] = node / kWidth;
    }
    changes_ = further;
  }
  changes_ = 0;
  total_ = sum(nodes_.back());
}

void SumTree::clear() noexcept {
  std::ranges::fill(nodes_, Node{});
  changes_ = 0;
  total_ = 0.0;
}

void SumTree::find(std::span<double> points, std::span<std::uint32_t> leaves) const noexcept {
  constexpr std::size_t kTogether = 32;  // go down side by side, for each waits for its next node
  for (std::size_t begin = 0; begin < points.size(); begin += kTogether) {
    const std::size_t count = std::min(kTogether, points.size() - begin);
    double* const point = points.data() + begin;
    std::uint32_t* const at = leaves.data() + begin;
    std::fill_n(at, count, 0u);
    for (std::size_t level = first_.size(); level-- > 0;) {
      const Node* const here = nodes_.data() + first_[level];
      const Node* const below = level == 0 ? nullptr : nodes_.data() + first_[level - 1];
      for (std::size_t i = 0; i < count; ++i) {
        const Node& node = here[at[i]];
        std::array<double, kWidth + 1> begins{};  // of the shares of the node's eight
        std::ranges::copy(sums_up_to(node), begins.begin() + 1);
        std::uint32_t child = 0;
        for (std::size_t k = 1; k < kWidth; ++k) child += begins[k] <= point[i];
        // The difference is rounded, perhaps to the end of the share.
        point[i] = std::min(point[i] - begins[child], node[child] * kBelow);
        at[i] = at[i] * static_cast<std::uint32_t>(kWidth) + child;
        if (below != nullptr) __builtin_prefetch(below + at[i]);
      }
    }
  }
}

}  // namespace brc
