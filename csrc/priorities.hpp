// Which transitions are to be drawn more often: the proportional variant of prioritized replay (Schaul et al.
// 2016, arXiv:1511.05952, sections 3.3 and 3.4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sum_tree.hpp"

namespace brc {

/// A priority p >= 0 for each cell, drawn with a probability of p^alpha / sum of p^alpha. Cells without a
/// transition, and those of priority zero, are never drawn.
class Priorities {
 public:
  /// Refuses an `alpha` that is not finite, or negative. No cell has a transition. O(cells).
  Priorities(std::size_t cells, double alpha);

  /// Refuses a priority that is negative or not finite, or whose power would be.
  void require(float priority) const;
  /// A transition that nothing is known of: it gets the largest priority so far. settle() must follow what
  /// changes cells.
  void renew(std::size_t cell) noexcept { put(cell, largest_, largest_power_); }
  /// Precondition: require() passed.
  void set(std::size_t cell, float priority) noexcept;
  void prefetch(std::size_t cell) const noexcept { tree_.prefetch(cell); }
  void remove(std::size_t cell) noexcept { put(cell, 0.0f, 0.0); }
  /// Lets `count` cells from `first` on change places, so that the one that was `begin` of them comes first.
  void rotate(std::size_t first, std::size_t count, std::size_t begin) noexcept;
  void settle() noexcept { tree_.settle(); }
  /// No cell has a transition, and `largest` is the largest priority so far. O(cells).
  void clear(float largest) noexcept;

  [[nodiscard]] std::span<const float> values() const noexcept { return values_; }  // [cells]
  /// The probability that a cell is drawn.
  [[nodiscard]] double share(std::size_t cell) const noexcept { return tree_.weight(cell) / tree_.total(); }
  [[nodiscard]] float largest() const noexcept { return largest_; }  // ever set; 1 at first
  /// Another one after each change.
  [[nodiscard]] std::uint64_t version() const noexcept { return version_; }
  [[nodiscard]] bool none() const noexcept { return tree_.total() == 0.0; }
  [[nodiscard]] std::size_t nbytes() const noexcept {
    return values_.size() * sizeof(float) + tree_.nbytes();
  }

  /// The cells of elements `first`, `first` + 1, ... of batch number `draw`. Element i takes words 2 (i mod
  /// 2) and the one after it, of the Philox block (draw low, draw high, i / 2, 0), as one number, and the 53
  /// highest bits of that as a fraction of the sum of powers. Precondition: not none(). O(log cells) each.
  void draw(std::uint64_t seed, std::uint64_t draw, std::size_t first,
            std::span<std::uint32_t> cells) const noexcept;

 private:
  [[nodiscard]] double power(float priority) const noexcept;
  void put(std::size_t cell, float priority, double power) noexcept {
    ++version_;
    values_[cell] = priority;
    tree_.set(cell, power);
  }

  SumTree tree_;  // of powers
  std::vector<float> values_;
  std::uint64_t version_ = 0;
  double alpha_;
  float most_;  // whose power still has a finite sum with all others
  float largest_ = 1.0f;
  double largest_power_ = 1.0;
};

/// Importance weights of a batch whose elements were drawn with probabilities `shares`: (P_least / P)^beta.
/// That is (n P)^-beta divided by the largest of the batch, for any n. O(M).
void weigh(std::span<const double> shares, double beta, std::span<float> out) noexcept;

}  // namespace brc
