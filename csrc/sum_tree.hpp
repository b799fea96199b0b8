// One of many, drawn with chances that change one by one.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace brc {

/// L weights and their sums: a point of the whole sum is in the share of one leaf.
///
/// A node is one cache line, the eight sums of the nodes below it, or eight weights. A sum is always made
/// anew from the eight below it, never by a difference: no error outlives the weight that made it.
///
/// Precision: a sum of eight is three additions deep, so that a leaf's share is right to within
/// 3 * depth * 2^-53 of the whole, less than 1e-14. A leaf of weight zero has no share at all.
class SumTree {
 public:
  /// Of a weight that is not zero. All are normal numbers, and have sums that are finite.
  static constexpr double kLeast = 1e-290, kMost = 1e290;

  /// All weights zero. L lies in 1..2^31. O(L).
  explicit SumTree(std::size_t leaves);

  [[nodiscard]] double weight(std::size_t leaf) const noexcept {
    return nodes_[leaf / kWidth][leaf % kWidth];
  }
  /// Sets a weight: zero, or one in kLeast..kMost. settle() must follow before the next find(). O(1) where
  /// leaves follow each other, else O(depth).
  void set(std::size_t leaf, double weight) noexcept {
    const auto node = static_cast<std::uint32_t>(leaf / kWidth);
    nodes_[node][leaf % kWidth] = weight;
    if (changes_ > 0 && changed_[changes_ - 1] == node) return;
    if (changes_ == changed_.size()) settle();
    changed_[changes_++] = node;
  }
  /// Asks for the memory of a leaf that will be set.
  void prefetch(std::size_t leaf) const noexcept { __builtin_prefetch(&nodes_[leaf / kWidth], 1); }
  void settle() noexcept;
  /// All weights zero. O(L).
  void clear() noexcept;

  [[nodiscard]] std::size_t nbytes() const noexcept { return nodes_.size() * sizeof(Node); }
  /// The sum of the weights, as it was settled.
  [[nodiscard]] double total() const noexcept { return total_; }
  /// The leaves [M] in whose shares the points [M] lie, which are used up. Precondition: they are at least
  /// zero and below the total. O(M depth).
  void find(std::span<double> points, std::span<std::uint32_t> leaves) const noexcept;

 private:
  static constexpr std::size_t kWidth = 8;
  struct alignas(64) Node : std::array<double, kWidth> {};

  [[nodiscard]] std::size_t nodes(std::size_t level) const noexcept {
    return (level + 1 == first_.size() ? nodes_.size() : first_[level + 1]) - first_[level];
  }

  std::vector<Node> nodes_;         // level after level, that of the weights first, the root last
  std::vector<std::size_t> first_;  // node of each level
  double total_ = 0.0;
  std::array<std::uint32_t, 1024> changed_{};  // nodes of weights whose sums are not settled
  std::size_t changes_ = 0;
};

}  // namespace brc
