// The summary of an update against its formulas in double precision.
#include "summary.hpp"

#include <limits>
#include <numeric>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

double total(const Floats& x) {
  return std::accumulate(x.begin(), x.end(), 0.0);
}

void check(std::int64_t rows, std::int64_t members) {
  Floats losses = normal(members * rows);
  const Floats log_probs = normal(rows), values = normal(members * rows, 3.0f);
  Floats metrics(brc::kMetrics, 11.0f), since(brc::kMetrics), gradient(1);
  const auto run = [&](float step) {
    const auto count = members * rows;
    brc::update_summary({rows, count, count, losses.data(), log_probs.data(), values.data(), 0.3f, -2.5f},
                        step, metrics.data(), gradient.data(), since.data());
  };
  run(1.0f);
  const auto batch = static_cast<double>(rows);
  const double entropy = -total(log_probs) / batch,
               q = total(values) / (batch * static_cast<double>(members));
  const double alpha = 0.3f, loss = alpha * (entropy + 2.5);
  const double expected[] = {
      total(losses) / batch, 11.0, -(q + alpha * entropy), 11.0, entropy, q, alpha, loss};
  for (std::size_t i = 0; i < metrics.size(); ++i) {
    expect_close(metrics[i], expected[i], 1e-6, "metric", rows);
    expect(since[i] == 0.0f, "finite metrics are not noted", rows);
  }
  expect_close(gradient[0], loss, 1e-6, "gradient", rows);
  losses.back() = std::numeric_limits<float>::quiet_NaN();
  metrics[3] = std::numeric_limits<float>::infinity();
  run(2.0f);
  run(3.0f);
  expect(since == Floats({2, 0, 0, 2, 0, 0, 0, 0}), "the first step with a bad metric is noted", rows);
}

}  // namespace

int main() {
  for (const std::int64_t rows : {1, 2, 7, 64, 257, 1024}) {
    for (const std::int64_t members : {1, 2, 5}) check(rows, members);
  }
  std::puts("summary: all checks passed");
  return 0;
}
