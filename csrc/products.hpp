// Matrix products of stacked networks, for processors with AVX-512.
//
//     out[n] = a[n] b[n]  (+ bias[n])  (+ out[n])
//
// Both factors go through copies in the order in which they are used: a panel of 32 columns of b, and a tile
// of up to 14 rows of a, whose 28 vectors of sums stay in registers. A block of b is copied once for all
// rows, a tile of a once for all panels of the block. Sums are in float32, in the order of their terms,
// whatever the number of threads.
#pragma once

#include <cstdint>

namespace brc {

// Of factors, and of what comes out.
enum class Number { float32, bfloat16 };

// Whether this processor has the instructions.
bool multiplies(Number kind);

struct ProductShape {
  std::int64_t networks;
  std::int64_t rows;     // of a and out
  std::int64_t columns;  // of b and out
  std::int64_t depth;    // columns of a, rows of b
};

// [networks, rows, columns] any distances apart, in elements; rows or columns must be contiguous.
struct Factor {
  const void* data;
  std::int64_t network_stride;
  std::int64_t row_stride;
  std::int64_t column_stride;
};

// Rows are contiguous. `accumulate`: what is there is added to.
struct Product {
  void* data;
  Number kind;
  std::int64_t network_stride;
  std::int64_t row_stride;
  bool accumulate;
};

// [columns] of each network; null for none.
struct Bias {
  const float* data;
  std::int64_t network_stride;
};

// out must overlap neither factor.
void multiply(const ProductShape& shape, Number kind, const Factor& a, const Factor& b, const Bias& bias,
              const Product& out);

}  // namespace brc
