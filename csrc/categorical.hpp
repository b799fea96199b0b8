// C51 projection of rows of mass onto evenly spaced atoms. Buffers are the caller's, contiguous and apart.
#pragma once

#include <cstdint>

namespace brc {

// out[b] = mass of probs[b] moved from its positions onto K atoms in [-v_max, v_max], split linearly between
// the two neighbours; what lies beyond is clipped to the ends, and an exact hit keeps its atom. NaN gives a
// row of NaN. probs, positions, out: [rows, atoms], atoms >= 2.
void categorical_projection(std::int64_t rows, std::int64_t atoms, const float* probs, const float* positions,
                            float v_max, float* out);

}  // namespace brc
