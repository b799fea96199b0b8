// Sums over the rows of stacked networks, as gradients of biases are; and rounding.
#pragma once

#include <cstdint>

#include "numbers.hpp"
#include "row_pass.hpp"

namespace brc {

// out[n, i] = sum over rows of x[n, row, i], added up in float in the order of the rows. x: [networks, rows,
// width], contiguous. out: [width] of each network, `out_stride` apart, apart from x.
template <class T>
void sum_rows(RowShape shape, const T* x, T* out, std::int64_t out_stride);

// out[i] = x[i], rounded.
void round_all(std::int64_t count, const float* x, BFloat16* out);

}  // namespace brc
