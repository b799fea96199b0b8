#include "summary.hpp"

#include <cmath>

#include "vector_clones.hpp"

namespace brc {
namespace {

BRC_VECTOR_CLONES double sum(std::int64_t count, const float* x) {
  double total = 0.0;
  for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(x[i]);
  return total;
}

}  // namespace

void update_summary(Summary given, float step, float* metrics, float* gradient, float* since) {
  const auto rows = static_cast<double>(given.rows);
  const auto entropy = static_cast<float>(-sum(given.rows, given.log_probs) / rows);
  const auto q =
      static_cast<float>(sum(given.values_count, given.q_values) / static_cast<double>(given.values_count));
  *gradient = given.alpha * (entropy - given.target_entropy);
  metrics[0] = static_cast<float>(sum(given.losses_count, given.losses) / rows);
  metrics[2] = -(q + given.alpha * entropy);
  metrics[4] = entropy;
  metrics[5] = q;
  metrics[6] = given.alpha;
  metrics[7] = *gradient;
  for (int i = 0; i < kMetrics; ++i) {
    if (since[i] == 0.0f && !std::isfinite(metrics[i])) since[i] = step;
  }
}

}  // namespace brc
