// What is left of an update once its networks have moved: its metrics and the temperature's gradient.
//
// Buffers are the caller's and must not overlap. Nothing is allocated and nothing throws. Sums are added in
// an order that depends on their length and the processor only.
#pragma once

#include <cstdint>

namespace brc {

// What is averaged: losses [members, rows], log-probabilities [rows] and values [of any number], without
// gaps.
struct Summary {
  std::int64_t rows;
  std::int64_t losses_count;
  std::int64_t values_count;
  const float* losses;
  const float* log_probs;
  const float* q_values;
  float alpha;
  float target_entropy;
};

constexpr int kMetrics = 8;

// metrics = {sum(losses) / rows, stays, -(q + alpha entropy), stays, entropy, q, alpha, temperature's loss},
// with entropy = -mean(log_probs), q = mean(q_values) and the loss alpha (entropy - target_entropy), which is
// also the gradient. since = step where it is 0 and the metric is not finite. metrics, since: [kMetrics].
void update_summary(Summary given, float step, float* metrics, float* gradient, float* since);

}  // namespace brc
