// The CPU kernels against their definitions in double precision, at sizes around a vector's length; run under
// sanitizers, every buffer is exactly as large as the kernels may touch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "categorical.hpp"
#include "layer_norm.hpp"

namespace {

using Floats = std::vector<float>;

std::mt19937 rng(0);

Floats normal(std::int64_t count) {
  std::normal_distribution<float> draw;
  Floats out(static_cast<std::size_t>(count));
  for (float& value : out) value = draw(rng);
  return out;
}

void expect(bool holds, const char* what, std::int64_t width) {
  if (holds) return;
  std::printf("failed: %s at width %lld\n", what, static_cast<long long>(width));
  std::exit(1);
}

bool close(double a, double b) {
  return std::abs(a - b) <= 1e-3 * (1.0 + std::abs(b));
}

// The loss sum(dy * forward(...)) in double precision, for gradients by finite differences.
double loss(brc::NormShape shape, const Floats& dy, const Floats& x, const Floats& bias, const Floats& weight,
            const Floats& shift, bool relu, std::int64_t bump, double by) {
  double total = 0.0;
  for (std::int64_t row = 0; row < shape.networks * shape.batch; ++row) {
    const std::int64_t p = row / shape.batch * shape.width;
    std::vector<double> h;
    for (std::int64_t i = 0; i < shape.width; ++i) {
      const std::int64_t at = row * shape.width + i;
      h.push_back(static_cast<double>(x[static_cast<std::size_t>(at)]) +
                  bias[static_cast<std::size_t>(p + i)] + (at == bump ? by : 0.0));
    }
    const double mean = std::accumulate(h.begin(), h.end(), 0.0) / static_cast<double>(shape.width);
    double variance = 0.0;
    for (const double value : h) variance += (value - mean) * (value - mean);
    const double scale = 1.0 / std::sqrt(variance / static_cast<double>(shape.width) + 1e-6);
    for (std::int64_t i = 0; i < shape.width; ++i) {
      const auto at = static_cast<std::size_t>(p + i);
      double y = (h[static_cast<std::size_t>(i)] - mean) * scale * weight[at] + shift[at];
      if (relu && y < 0.0) y = 0.0;
      total += y * dy[static_cast<std::size_t>(row * shape.width + i)];
    }
  }
  return total;
}

void check_norm(brc::NormShape shape, bool relu) {
  const std::int64_t rows = shape.networks * shape.batch;
  const std::int64_t size = rows * shape.width;
  const std::int64_t vectors = shape.networks * shape.width;
  const Floats x = normal(size), dy = normal(size);
  const Floats bias = normal(vectors), weight = normal(vectors), shift = normal(vectors);
  Floats y(x.size()), mean(static_cast<std::size_t>(rows)), rstd(mean);
  brc::bias_layer_norm_forward(shape, x.data(), bias.data(), weight.data(), shift.data(), nullptr, relu,
                               1e-6f, y.data(), mean.data(), rstd.data());
  const double total =
      std::inner_product(y.begin(), y.end(), dy.begin(), 0.0, std::plus<>(),
                         [](float a, float b) { return static_cast<double>(a) * static_cast<double>(b); });
  expect(close(total, loss(shape, dy, x, bias, weight, shift, relu, -1, 0.0)), "forward", shape.width);

  Floats dx(x.size()), dbias(bias.size()), dweight(bias.size()), dshift(bias.size());
  brc::bias_layer_norm_backward(shape, dy.data(), relu ? y.data() : nullptr, x.data(), bias.data(),
                                weight.data(), mean.data(), rstd.data(), dx.data(), dbias.data(),
                                dweight.data(), dshift.data());
  for (std::int64_t at = 0; at < size; at += std::max<std::int64_t>(1, size / 16)) {
    const double up = loss(shape, dy, x, bias, weight, shift, relu, at, 1e-5);
    const double down = loss(shape, dy, x, bias, weight, shift, relu, at, -1e-5);
    expect(close(dx[static_cast<std::size_t>(at)], (up - down) / 2e-5), "gradient", shape.width);
  }
  Floats alone(x.size());
  brc::bias_layer_norm_backward(shape, dy.data(), relu ? y.data() : nullptr, x.data(), bias.data(),
                                weight.data(), mean.data(), rstd.data(), alone.data(), nullptr, nullptr,
                                nullptr);
  expect(alone == dx, "gradient of the input alone", shape.width);
}

void check_projection(std::int64_t atoms) {
  const std::int64_t rows = 5;
  const Floats probs(static_cast<std::size_t>(rows * atoms), 1.0f / static_cast<float>(atoms));
  Floats positions = normal(rows * atoms);
  for (float& value : positions) value *= 8.0f;  // many beyond the support
  positions[0] = INFINITY;
  positions[1] = -INFINITY;
  Floats out(probs.size());
  brc::categorical_projection(rows, atoms, probs.data(), positions.data(), 10.0f, out.data());
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto first = out.begin() + row * atoms;
    expect(close(std::accumulate(first, first + atoms, 0.0), 1.0), "mass of the projection", atoms);
  }
}

}  // namespace

int main() {
  for (const std::int64_t width : {2, 3, 7, 8, 15, 16, 17, 33, 64, 101, 128}) {
    for (const bool relu : {false, true}) {
      check_norm({2, 3, width}, relu);
      check_norm({1, 1, width}, relu);
    }
    check_projection(width);
  }
  std::puts("cpu kernels: all checks passed");
}
