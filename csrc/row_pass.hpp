// What is done to whole rows of stacked networks, by several threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "workers.hpp"

namespace brc {

// Rows are shared out in pieces of this size, whatever the number of threads: sums over rows are added up
// piece by piece, and have the same bits for any.
constexpr std::int64_t PIECE = 64;

struct RowShape {
  std::int64_t networks;
  std::int64_t rows;  // of each
  std::int64_t width;

  [[nodiscard]] std::int64_t pieces() const { return (rows + PIECE - 1) / PIECE; }
};

class RowPass {
 public:
  explicit RowPass(RowShape shape) : shape_(shape) {}
  RowPass(const RowPass&) = delete;
  RowPass& operator=(const RowPass&) = delete;
  virtual ~RowPass() = default;

  [[nodiscard]] const RowShape& shape() const { return shape_; }

  // Rows of a network, all of one piece. Those of a piece come in order, from one thread.
  virtual void rows(std::int64_t network, std::int64_t start, std::int64_t stop) = 0;

  // When all rows were passed over.
  virtual void finish() {}

  void run() {
    const std::int64_t pieces = shape_.pieces();
    const double cost = static_cast<double>(shape_.networks * shape_.rows * shape_.width) / 4.0;
    for_each_item(shape_.networks * pieces, cost, [&](std::int64_t item) {
      const std::int64_t start = item % pieces * PIECE;
      rows(item / pieces, start, std::min(start + PIECE, shape_.rows));
    });
    finish();
  }

 private:
  RowShape shape_;
};

}  // namespace brc
