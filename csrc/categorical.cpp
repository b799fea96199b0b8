#include "categorical.hpp"

#include <algorithm>
#include <cmath>

namespace brc {

void categorical_projection(std::int64_t rows, std::int64_t atoms, const float* probs, const float* positions,
                            float v_max, float* out) {
  const float spacing = 2.0f * v_max / static_cast<float>(atoms - 1);
  const float last = static_cast<float>(atoms - 1);
  std::fill_n(out, rows * atoms, 0.0f);
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* p = probs + row * atoms;
    const float* y = positions + row * atoms;
    float* target = out + row * atoms;
    for (std::int64_t k = 0; k < atoms; ++k) {
      const float index = std::min(std::max((y[k] + v_max) / spacing, 0.0f), last);
      if (std::isnan(y[k])) {
        std::fill_n(target, atoms, y[k]);
        break;
      }
      const auto lower = static_cast<std::int64_t>(index);  // index is not negative
      const float upper_mass = p[k] * (index - static_cast<float>(lower));
      target[lower] += p[k] - upper_mass;
      target[std::min(lower + 1, atoms - 1)] += upper_mass;
    }
  }
}

}  // namespace brc
