#include "optimizer.hpp"

#include <algorithm>
#include <cmath>

#include "vector_clones.hpp"

namespace brc {
namespace {

// Squares are added up in float within a chunk, then in double.
constexpr std::int64_t CHUNK = 512;

template <bool TARGET>
BRC_INLINE float step(std::int64_t count, float* __restrict param, const float* __restrict grad,
                      float* __restrict exp_avg, float* __restrict exp_avg_sq, float* __restrict target,
                      const AdamW& rule) {
  const auto rate = static_cast<float>(rule.learning_rate);
  const auto beta2 = static_cast<float>(rule.beta2);
  const auto rest1 = static_cast<float>(1.0 - rule.beta1);
  const auto rest2 = static_cast<float>(1.0 - rule.beta2);
  const auto eps = static_cast<float>(rule.eps);
  const auto decay = static_cast<float>(rule.weight_decay);
  const auto mean_scale = static_cast<float>(rule.mean_scale);
  const auto root_scale = static_cast<float>(rule.root_scale);
  const auto grad_scale = static_cast<float>(rule.grad_scale);
  // target + tau (param - target), and from the other end for large tau, as torch.lerp
  const bool near = rule.tau >= 0.5;
  const auto share = static_cast<float>(near ? rule.tau - 1.0 : rule.tau);
  float squares = 0.0f;
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < count; ++i) {
    squares += grad[i] * grad[i];
    const float g = grad[i] * grad_scale;
    const float m = exp_avg[i] + rest1 * (g - exp_avg[i]);
    const float v = beta2 * exp_avg_sq[i] + rest2 * (g * g);
    const float update = mean_scale * m / (root_scale * std::sqrt(v) + eps);
    const float p = param[i] - rate * (update + decay * param[i]);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = p;
    if constexpr (TARGET) {
      const float q = target[i];
      target[i] = (near ? p : q) + share * (p - q);
    }
  }
  return squares;
}

}  // namespace

BRC_VECTOR_CLONES
double adamw(std::int64_t count, float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
             float* target, AdamW rule) {
  double squares = 0.0;
  for (std::int64_t at = 0; at < count; at += CHUNK) {
    const std::int64_t here = std::min(CHUNK, count - at);
    const float part =
        target != nullptr
            ? step<true>(here, param + at, grad + at, exp_avg + at, exp_avg_sq + at, target + at, rule)
            : step<false>(here, param + at, grad + at, exp_avg + at, exp_avg_sq + at, nullptr, rule);
    squares += static_cast<double>(part);
  }
  return squares;
}

BRC_VECTOR_CLONES
double sum_of_squares(std::int64_t count, const float* x) {
  double squares = 0.0;
  for (std::int64_t at = 0; at < count; at += CHUNK) {
    const std::int64_t here = std::min(CHUNK, count - at);
    float part = 0.0f;
    for (std::int64_t i = 0; i < here; ++i) part += x[at + i] * x[at + i];
    squares += static_cast<double>(part);
  }
  return squares;
}

}  // namespace brc
