#include "optimizer.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector_clones.hpp"
#include "workers.hpp"

namespace brc {
namespace {

// Squares are added up in float within a chunk, then in double within a part of the buffers, and those of the
// parts in order: by any number of threads in the same way.
constexpr std::int64_t CHUNK = 512;
constexpr std::int64_t PART = 32 * CHUNK;

// Without a target, and where nothing is rounded, the pointers are not used.
template <bool TARGET, class G>
BRC_INLINE float step(std::int64_t count, const Moved<G>& x, const AdamW& rule) {
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
  float* __restrict param = x.param;
  const G* __restrict grad = x.grad;
  float* __restrict exp_avg = x.exp_avg;
  float* __restrict exp_avg_sq = x.exp_avg_sq;
  float* __restrict target = x.target;
  float squares = 0.0f;
  BRC_INDEPENDENT
  for (std::int64_t i = 0; i < count; ++i) {
    const float given = to_float(grad[i]);
    squares += given * given;
    const float g = given * grad_scale;
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

BRC_INLINE void round_to(std::int64_t count, const float* __restrict x, BFloat16* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_float<BFloat16>(x[i]);
}

// What is rounded is still in the cache.
template <class G>
BRC_INLINE double steps(std::int64_t count, Moved<G> x, const AdamW& rule) {
  double squares = 0.0;
  for (std::int64_t at = 0; at < count; at += CHUNK) {
    const std::int64_t here = std::min(CHUNK, count - at);
    const Moved<G> own = x.from(at);
    const float part = own.target != nullptr ? step<true>(here, own, rule) : step<false>(here, own, rule);
    if (own.low != nullptr) round_to(here, own.param, own.low);
    if (own.target_low != nullptr) round_to(here, own.target, own.target_low);
    squares += static_cast<double>(part);
  }
  return squares;
}

BRC_VECTOR_CLONES double steps_of(std::int64_t count, const Moved<float>& x, const AdamW& rule) {
  return steps(count, x, rule);
}

BRC_VECTOR_CLONES double steps_of(std::int64_t count, const Moved<BFloat16>& x, const AdamW& rule) {
  return steps(count, x, rule);
}

}  // namespace

template <class G>
double adamw(std::int64_t count, const Moved<G>& x, const AdamW& rule) {
  const std::int64_t parts = (count + PART - 1) / PART;
  std::vector<double> squares(static_cast<std::size_t>(parts));
  for_each_item(parts, static_cast<double>(count) / 2.0, [&](std::int64_t part) {
    const std::int64_t start = part * PART;
    squares[static_cast<std::size_t>(part)] = steps_of(std::min(PART, count - start), x.from(start), rule);
  });
  double total = 0.0;
  for (const double part : squares) total += part;
  return total;
}

template double adamw(std::int64_t, const Moved<float>&, const AdamW&);
template double adamw(std::int64_t, const Moved<BFloat16>&, const AdamW&);

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
