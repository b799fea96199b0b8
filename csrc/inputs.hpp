// Network inputs [observation, action, normalised task embedding, zeros], and the embedding's gradient.
//
// Buffers are the caller's and apart; rows may be any distance apart, in elements.
#pragma once

#include <cstdint>

#include "numbers.hpp"

namespace brc {

// Rows of `width` floats, `stride` apart; data is null where there are none.
struct Rows {
  const float* data;
  std::int64_t width;
  std::int64_t stride;
};

// [tasks, width], contiguous, and the task of each row; data is null where there is none. By its L1 norm, or
// L2.
struct Embedding {
  const float* data;
  std::int64_t tasks;
  std::int64_t width;
  const std::int64_t* ids;
  bool l1;
};

// out: [rows, width]. Throws std::out_of_range for an id outside of [0, tasks).
template <class T>
void pack_inputs(std::int64_t rows, Rows observations, Rows actions, const Embedding& embedding, T* out,
                 std::int64_t width);

// The gradient [tasks, width] of the table for that of its normalised rows, summed over members:
//   l2:  out[t] = (s - n (n . s)) / |e|,   l1:  out[t] = (s - sign(e) (n . s)) / |e|
// with e the row of the table, n = e / |e| and s the sum of the gradients of the rows of task t. grad:
// [members, rows, width]. Throws as pack_inputs does.
template <class T>
void embedding_gradient(std::int64_t members, std::int64_t rows, const float* grad,
                        std::int64_t member_stride, std::int64_t row_stride, const Embedding& embedding,
                        T* out);

}  // namespace brc
