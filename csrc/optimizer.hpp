// AdamW over flat buffers in one pass, with the target network, copies in low precision and the gradient's
// norm.
//
// Buffers are the caller's, of `count` numbers, and must not overlap. Sums are added in an order that depends
// on `count` and the processor only.
#pragma once

#include <cstdint>

#include "numbers.hpp"

namespace brc {

// Rounded to float where used.
struct AdamW {
  double learning_rate;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double mean_scale;  // 1 / (1 - beta1^t) in step t, from 1
  double root_scale;  // 1 / sqrt(1 - beta2^t)
  double tau;
  double grad_scale;
};

// What a step reads and writes; target, low and target_low, the last two rounded, may be null.
template <class G>
struct Moved {
  float* param;
  const G* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* target;
  BFloat16* low;
  BFloat16* target_low;

  [[nodiscard]] Moved from(std::int64_t at) const {
    const auto past = [at](auto* x) { return x == nullptr ? nullptr : x + at; };
    return {past(param),  past(grad), past(exp_avg),   past(exp_avg_sq),
            past(target), past(low),  past(target_low)};
  }
};

// With g = grad_scale * grad:
//   exp_avg += (1 - beta1) (g - exp_avg),   exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
//   param -= learning_rate (mean_scale exp_avg / (root_scale sqrt(exp_avg_sq) + eps) + weight_decay param)
//   target += tau (param - target), exactly param for tau = 1
// Returns the sum of squares of grad. NaN stays in its place.
template <class G>
double adamw(std::int64_t count, const Moved<G>& x, const AdamW& rule);

// The sum of squares, infinite where the square of a float is.
double sum_of_squares(std::int64_t count, const float* x);

}  // namespace brc
