// AdamW against its formula in double precision.
#include "optimizer.hpp"

#include <limits>
#include <numeric>

#include "kernel_checks.hpp"
#include "workers.hpp"

namespace {

using namespace checks;

brc::AdamW rule_at(int t, float tau, float grad_scale) {
  brc::AdamW rule{3e-3, 0.9, 0.999, 1e-8, 0.1, 0.0, 0.0, tau, grad_scale};
  rule.mean_scale = 1.0 / (1.0 - std::pow(0.9, t));
  rule.root_scale = 1.0 / std::sqrt(1.0 - std::pow(0.999, t));
  return rule;
}

double sum_squared(const Floats& x) {
  return std::accumulate(x.begin(), x.end(), 0.0,
                         [](double sum, float value) { return sum + static_cast<double>(value) * value; });
}

void check(std::int64_t count, bool moves, float tau, float grad_scale) {
  Floats param = normal(count), exp_avg(index(count)), exp_avg_sq(exp_avg), target = normal(count);
  Doubles p(param.begin(), param.end()), m(index(count)), v(m), q(target.begin(), target.end());
  for (int t = 1; t <= 5; ++t) {
    const Floats grad = normal(count);
    const brc::AdamW rule = rule_at(t, tau, grad_scale);
    const double squares = brc::adamw<float>(count,
                                             {param.data(), grad.data(), exp_avg.data(), exp_avg_sq.data(),
                                              moves ? target.data() : nullptr, nullptr, nullptr},
                                             rule);
    expect_close(squares, sum_squared(grad), 1e-6, "sum of squares of a step", count);
    expect_close(brc::sum_of_squares(count, grad.data()), sum_squared(grad), 1e-6, "sum of squares", count);
    for (std::size_t i = 0; i < param.size(); ++i) {
      const double g = static_cast<double>(grad_scale) * grad[i];
      m[i] += 0.1 * (g - m[i]);
      v[i] = 0.999 * v[i] + 0.001 * g * g;
      const double root = std::sqrt(v[i] / (1.0 - std::pow(0.999, t)));
      p[i] -= 3e-3 * (m[i] / (1.0 - std::pow(0.9, t)) / (root + 1e-8) + 0.1 * p[i]);
      if (moves) q[i] += static_cast<double>(tau) * (p[i] - q[i]);
      if (moves && tau == 1.0f) expect(target[i] == param[i], "target is the parameter", count);
    }
  }
  for (std::size_t i = 0; i < param.size(); ++i) {
    expect_close(param[i], p[i], 1e-6, "parameter", count);
    expect_close(exp_avg[i], m[i], 1e-6, "mean", count);
    expect_close(exp_avg_sq[i], v[i], 1e-7, "mean of squares", count);
    expect_close(target[i], q[i], 1e-6, "target", count);
  }
}

// NaN and infinity stay in their place, and the sum tells of them; the sum does not depend on the address.
void check_extremes(std::int64_t count) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Floats grad = normal(count);
  const Floats clean = grad;
  grad[index(count / 2)] = nan;
  Floats param(index(count), 1.0f), exp_avg(param.size()), exp_avg_sq(param.size()), target(param.size());
  const brc::Moved<float> moved_by = {param.data(),  grad.data(), exp_avg.data(), exp_avg_sq.data(),
                                      target.data(), nullptr,     nullptr};
  const double squares = brc::adamw(count, moved_by, rule_at(1, 0.25f, 1.0f));
  expect(std::isnan(squares), "sum of squares with NaN", count);
  expect(std::isnan(brc::sum_of_squares(count, grad.data())), "sum of squares with NaN", count);
  for (const Floats* x : {&param, &exp_avg, &exp_avg_sq, &target}) {
    for (std::int64_t i = 0; i < count; ++i) {
      expect(std::isnan((*x)[index(i)]) == (i == count / 2), "NaN in its place", count);
    }
  }
  grad[index(count / 2)] = 1e30f;
  expect(std::isinf(brc::sum_of_squares(count, grad.data())), "infinite sum of squares", count);
  for (const std::size_t off : {1, 3, 5}) {
    Floats moved(off);
    moved.insert(moved.end(), clean.begin(), clean.end());
    expect(brc::sum_of_squares(count, moved.data() + off) == brc::sum_of_squares(count, clean.data()),
           "sum of squares anywhere", count);
  }
}

// Of gradients in bfloat16 the step is that of the same numbers in float; copies are what was made, rounded;
// and several threads make the same bits.
void check_low(std::int64_t count) {
  const Floats drawn = normal(count), start = normal(count), behind = normal(count);
  std::vector<brc::BFloat16> grad(drawn.size()), low(drawn.size()), target_low(drawn.size());
  Floats same(drawn.size());
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    grad[i] = brc::from_float<brc::BFloat16>(drawn[i]);
    same[i] = brc::to_float(grad[i]);
  }
  Floats param[2] = {start, start}, target[2] = {behind, behind};
  Floats exp_avg[2] = {Floats(index(count)), Floats(index(count))};
  Floats exp_avg_sq[2] = {exp_avg[0], exp_avg[0]};
  const brc::AdamW rule = rule_at(1, 0.005f, 1.0f);
  const double squares = brc::adamw<float>(count,
                                           {param[0].data(), same.data(), exp_avg[0].data(),
                                            exp_avg_sq[0].data(), target[0].data(), nullptr, nullptr},
                                           rule);
  brc::set_threads(3);
  const double others =
      brc::adamw<brc::BFloat16>(count,
                                {param[1].data(), grad.data(), exp_avg[1].data(), exp_avg_sq[1].data(),
                                 target[1].data(), low.data(), target_low.data()},
                                rule);
  brc::set_threads(1);
  expect(squares == others && param[0] == param[1] && target[0] == target[1], "a step in bfloat16", count);
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    expect(low[i].bits == brc::from_float<brc::BFloat16>(param[1][i]).bits, "the rounded parameter", count);
    expect(target_low[i].bits == brc::from_float<brc::BFloat16>(target[1][i]).bits, "the rounded target",
           count);
  }
}

}  // namespace

int main() {
  for (const std::int64_t count : {0, 1, 7, 16, 17, 1000, 2049, 10001}) {
    check(count, false, 0.0f, 1.0f);
    for (const float tau : {0.0f, 0.005f, 0.5f, 1.0f}) check(count, true, tau, 0.25f);
    if (count > 0) check_extremes(count);
  }
  for (const std::int64_t count : {1, 513, 100000}) check_low(count);
  std::puts("optimizer: all checks passed");
}
