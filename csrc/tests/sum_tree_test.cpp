// Draws from a sum tree against sums of the weights one after the other.
#include "sum_tree.hpp"

#include <cmath>
#include <utility>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

std::vector<std::uint32_t> found(const brc::SumTree& tree, Doubles points) {
  std::vector<std::uint32_t> leaves(points.size());
  tree.find(points, leaves);
  return leaves;
}

double uniform() {
  return static_cast<double>(rng()) * 0x1p-32;
}

double below(double x) {
  return std::nextafter(x, 0.0);
}

constexpr std::int64_t SIZES[] = {1, 2, 7, 8, 9, 63, 64, 65, 512, 513, 4097, 40000};

/// Weights that are small integers have exact sums: each point belongs to one leaf without any doubt.
void every_share_begins_and_ends_where_the_sums_say() {
  for (const std::int64_t size : SIZES) {
    brc::SumTree tree(index(size));
    Doubles weights(index(size));
    for (int round = 0; round < 4; ++round) {
      const std::int64_t changes = round == 0 ? size : size / 3;
      for (std::int64_t i = 0; i < changes; ++i) {
        const std::size_t leaf = round == 0 ? index(i) : rng() % index(size);
        tree.set(leaf, weights[leaf] = static_cast<double>(rng() % 4));  // zero for a quarter of them
      }
      tree.set(index(size) - 1, weights.back() = round % 2);
      if (size == 1) tree.set(0, weights[0] = 3.0);
      tree.settle();
      double sum = 0.0;
      Doubles points;
      std::vector<std::uint32_t> expected;
      for (std::size_t leaf = 0; leaf < weights.size(); ++leaf) {
        expect(tree.weight(leaf) == weights[leaf], "a weight", size);
        if (weights[leaf] == 0.0) continue;
        for (const double point : {sum, sum + 0.5, below(sum + weights[leaf])}) {
          points.push_back(point);
          expected.push_back(static_cast<std::uint32_t>(leaf));
        }
        sum += weights[leaf];
      }
      expect(tree.total() == sum, "the total", size);
      if (sum > 0.0) expect(found(tree, points) == expected, "a leaf", size);
    }
  }
}

/// Of any size: a leaf is never further from its point than sums of doubles are from exact ones.
void shares_are_right_to_within_what_is_promised() {
  for (const std::int64_t size : SIZES) {
    brc::SumTree tree(index(size));
    std::vector<long double> ends(index(size));
    long double sum = 0.0L;
    for (std::size_t leaf = 0; leaf < index(size); ++leaf) {
      const bool none = leaf + 1 < index(size) && rng() % 5 == 0;
      const double weight = none ? 0.0 : std::exp(3.0 * normal(1)[0]);
      tree.set(leaf, weight);
      ends[leaf] = sum += weight;
    }
    tree.settle();
    expect(std::abs(tree.total() - sum) <= 1e-14L * sum, "the total", size);
    Doubles points;
    for (int i = 0; i < 3000; ++i) points.push_back(tree.total() * uniform());
    points.push_back(below(tree.total()));
    const auto leaves = found(tree, points);
    for (std::size_t i = 0; i < points.size(); ++i) {
      const std::uint32_t leaf = leaves[i];
      expect(leaf < index(size) && tree.weight(leaf) > 0.0, "a leaf that has a weight", size);
      expect(points[i] <= ends[leaf] + 1e-14L * sum, "a leaf that is not too early", size);
      expect(leaf == 0 || points[i] >= ends[leaf - 1] - 1e-14L * sum, "a leaf that is not too late", size);
    }
  }
}

/// Beside a weight that takes all of the precision, nothing but the total's order is left, and no zero.
void weights_of_all_sizes_are_drawn_and_zeros_never() {
  brc::SumTree tree(1000);
  const Doubles scales = {brc::SumTree::kLeast, 1e-30, 1.0, 1e17, brc::SumTree::kMost};
  for (const double scale : scales) {
    tree.clear();
    expect(tree.total() == 0.0, "a total of nothing", 0);
    for (const std::size_t leaf : {3, 500, 998}) tree.set(leaf, scale);
    tree.settle();
    const double all = tree.total();
    expect(std::isfinite(all), "a finite total", 3);
    const auto leaves = found(tree, {0.0, below(scale), scale * 1.5, scale * 2.5, below(all)});
    expect(leaves == std::vector<std::uint32_t>{3, 3, 500, 998, 998}, "the leaves that are not zero", 3);
  }
  for (std::size_t leaf = 0; leaf < 1000; ++leaf) tree.set(leaf, leaf % 3 == 0 ? 0.0 : scales[leaf % 5]);
  tree.settle();
  Doubles points;
  for (int i = 0; i < 3000; ++i) points.push_back(tree.total() * uniform());
  for (const std::uint32_t leaf : found(tree, points)) expect(tree.weight(leaf) > 0.0, "no zero", leaf);
}

/// Both ends of the last share are rounded here, away from each other: it looks as wide as what follows it.
void a_point_that_rounds_to_the_end_of_a_share_stays_in_it() {
  const double unit = 0x1p-52;
  brc::SumTree tree(64);
  tree.set(0, 1.0);
  tree.set(32, 0.5 * unit);
  tree.set(40, unit);
  tree.settle();
  expect(tree.total() == 1.0 + 2.0 * unit, "a total that is rounded up", 3);
  expect(found(tree, {1.0 + unit}) == std::vector<std::uint32_t>{40}, "the last leaf that is not zero", 3);
}

/// Whatever was set before, and in whatever order.
void no_error_outlives_the_weight_that_made_it() {
  for (const std::int64_t size : {9, 5000, 40000}) {
    brc::SumTree used(index(size)), fresh(index(size));
    for (int i = 0; i < 200000; ++i) {
      used.set(rng() % index(size), std::exp(20.0 * normal(1)[0]));
      if (rng() % 100 == 0) used.settle();
    }
    used.settle();
    for (std::size_t leaf = 0; leaf < index(size); ++leaf) fresh.set(leaf, used.weight(leaf));
    fresh.settle();
    expect(used.total() == fresh.total(), "a total with the same bits", size);
    Doubles points;
    for (int i = 0; i < 1000; ++i) points.push_back(used.total() * uniform());
    expect(found(used, points) == found(fresh, points), "the same leaves", size);
  }
}

}  // namespace

int main() {
  every_share_begins_and_ends_where_the_sums_say();
  shares_are_right_to_within_what_is_promised();
  weights_of_all_sizes_are_drawn_and_zeros_never();
  a_point_that_rounds_to_the_end_of_a_share_stays_in_it();
  no_error_outlives_the_weight_that_made_it();
}
