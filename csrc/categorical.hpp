// Categorical value distributions: rows of mass or logits over evenly spaced atoms in [-v_max, v_max].
//
// Buffers are the caller's and apart. A NaN stays in its row.
#pragma once

#include <cstdint>

namespace brc {

// out[b] = mass of probs[b] moved from its positions onto K atoms in [-v_max, v_max], split linearly between
// the two neighbours; what lies beyond is clipped to the ends, and an exact hit keeps its atom. NaN gives a
// row of NaN. probs, positions, out: [rows, atoms], contiguous, atoms >= 2.
void categorical_projection(std::int64_t rows, std::int64_t atoms, const float* probs, const float* positions,
                            float v_max, float* out);

// Logits [members, rows, atoms], each of the three axes at its own distance; the atoms lie side by side.
struct Logits {
  const float* data;
  std::int64_t members;
  std::int64_t member_stride;
  std::int64_t row_stride;
};

// Cross-entropy of each member against the soft Bellman target of its row, and its gradient:
//   p      = mean over members of softmax(next_logits)
//   target = projection of p from rewards + discounts * (z - temperature * log_probs) onto the atoms z
//   losses = -sum_k target_k log softmax(logits)_k,   grads = scale * (softmax(logits) - target)
// rewards, discounts, log_probs: [rows]. losses: [members, rows]. grads: [members, rows, columns], zero
// beyond the atoms, columns >= atoms; or null. atoms >= 2.
void categorical_bellman(std::int64_t rows, std::int64_t atoms, Logits logits, Logits next_logits,
                         const float* rewards, const float* discounts, const float* log_probs,
                         float temperature, float v_max, float scale, std::int64_t columns, float* losses,
                         float* grads);

// values[e, b] = sum_k softmax(logits)_k z_k with z = atom_values [atoms], contiguous [members, rows];
// grads[e, b, k] = scale * softmax_k * (z_k - values[e, b]), [members, rows, columns], zero beyond the atoms,
// columns >= atoms; or null.
void expected_value(std::int64_t rows, std::int64_t atoms, Logits logits, const float* atom_values,
                    float scale, std::int64_t columns, float* values, float* grads);

}  // namespace brc
