#include "row_sums.hpp"

#include <algorithm>

#include "vector_clones.hpp"

namespace brc {
namespace {

constexpr std::int64_t CHUNK = 256;  // columns whose sums stay in the first cache

template <class T>
BRC_INLINE void add_up(RowShape shape, const T* x, T* out, std::int64_t out_stride) {
  float sums[CHUNK];
  for (std::int64_t network = 0; network < shape.networks; ++network) {
    const T* const own = x + network * shape.rows * shape.width;
    for (std::int64_t start = 0; start < shape.width; start += CHUNK) {
      const std::int64_t count = std::min(CHUNK, shape.width - start);
      std::fill_n(sums, count, 0.0f);
      for (std::int64_t row = 0; row < shape.rows; ++row) {
        const T* __restrict values = own + row * shape.width + start;
        for (std::int64_t i = 0; i < count; ++i) sums[i] += to_float(values[i]);
      }
      T* __restrict to = out + network * out_stride + start;
      for (std::int64_t i = 0; i < count; ++i) to[i] = from_float<T>(sums[i]);
    }
  }
}

BRC_VECTOR_CLONES void add_up_of(RowShape shape, const float* x, float* out, std::int64_t out_stride) {
  add_up(shape, x, out, out_stride);
}

BRC_VECTOR_CLONES void add_up_of(RowShape shape, const BFloat16* x, BFloat16* out, std::int64_t out_stride) {
  add_up(shape, x, out, out_stride);
}

}  // namespace

template <class T>
void sum_rows(RowShape shape, const T* x, T* out, std::int64_t out_stride) {
  add_up_of(shape, x, out, out_stride);
}

BRC_VECTOR_CLONES void round_all(std::int64_t count, const float* x, BFloat16* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_float<BFloat16>(x[i]);
}

template void sum_rows(RowShape, const float*, float*, std::int64_t);
template void sum_rows(RowShape, const BFloat16*, BFloat16*, std::int64_t);

}  // namespace brc
