// The tanh-Gaussian sample against its definition and derivative in double precision.
#include "policy.hpp"

#include <limits>
#include <numbers>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

struct Strides {
  std::int64_t mean, raw, actions, dmean, draw;
};

// Rows of normals, `stride` apart, guards between them.
Floats strided(std::int64_t rows, std::int64_t width, std::int64_t stride, float scale) {
  Floats out = guards((rows - 1) * stride + width);
  for (std::int64_t row = 0; row < rows; ++row) {
    const Floats values = normal(width, scale);
    std::copy(values.begin(), values.end(), out.begin() + row * stride);
  }
  return out;
}

void check(std::int64_t rows, std::int64_t width, const Strides& s, float scale) {
  Floats mean = strided(rows, width, s.mean, scale);
  const Floats raw = strided(rows, width, s.raw, 1.0f), noise = normal(rows * width);
  Floats actions = guards(rows * s.actions), log_probs(index(rows));
  const Floats dactions = strided(rows, width, s.actions, 1.0f);
  Floats dmean = guards(rows * s.dmean), draw = guards(rows * s.draw);
  const float dlog = 0.3f;
  const brc::Gaussian given{rows, width, mean.data(), raw.data(), s.mean, s.raw, noise.data()};
  brc::tanh_gaussian(given, actions.data(), s.actions, log_probs.data());
  brc::tanh_gaussian_backward(given, dactions.data(), s.actions, dlog, dmean.data(), draw.data(), s.dmean,
                              s.draw);
  expect_guards(actions, rows, width, s.actions, "guards of the actions");
  expect_guards(dmean, rows, width, s.dmean, "guards of the mean's gradient");
  expect_guards(draw, rows, width, s.draw, "guards of raw's gradient");
  Floats quiet_dmean = guards(rows * s.dmean), quiet_draw = guards(rows * s.draw);
  brc::tanh_gaussian_backward(given, nullptr, 0, dlog, quiet_dmean.data(), quiet_draw.data(), s.dmean,
                              s.draw);
  for (std::int64_t b = 0; b < rows; ++b) {
    double log_prob = 0.0, size = 0.0;
    for (std::int64_t a = 0; a < width; ++a) {
      const double t = std::tanh(static_cast<double>(raw[index(b * s.raw + a)]));
      const double log_std = -4.0 + 6.0 * t, eps = noise[index(b * width + a)];
      const double spread = std::exp(log_std) * eps, u = mean[index(b * s.mean + a)] + spread;
      const double rounding = 1e-6 + 4e-7 * (std::abs(u - spread) + 4.0 * std::abs(spread));  // of u
      const double e = std::exp(-2.0 * std::abs(u)), slope = 4.0 * e / ((1.0 + e) * (1.0 + e));
      const double steepness = 2.0 * (std::abs(u) + std::log1p(e)) - 2.0 * std::log(2.0);
      log_prob += -0.5 * eps * eps - log_std - 0.5 * std::log(2.0 * std::numbers::pi) + steepness;
      size += 2.0 * rounding + 1e-6 * (5.0 + std::abs(u));
      expect_close(actions[index(b * s.actions + a)], std::tanh(u), rounding, "action", width);
      for (const bool quiet : {false, true}) {
        const double da = quiet ? 0.0 : dactions[index(b * s.actions + a)];
        const double du = da * slope + 2.0 * std::tanh(u) * dlog;
        const double exact = 6.0 * (1.0 - t * t) * (du * spread - dlog);
        const double tolerance = 12.0 * rounding * (1.0 + std::abs(spread));
        expect_close((quiet ? quiet_dmean : dmean)[index(b * s.dmean + a)], du, 2.0 * rounding, "dmean",
                     width);
        expect_close((quiet ? quiet_draw : draw)[index(b * s.draw + a)], exact, tolerance, "draw", width);
      }
    }
    expect_close(log_probs[index(b)], log_prob, size, "log-probability", width);
  }
  // a NaN stays in its row, and in its element backward
  const Floats before = log_probs, dmean_before = dmean;
  mean[index((rows / 2) * s.mean)] = NOT_A_NUMBER;
  brc::tanh_gaussian(given, actions.data(), s.actions, log_probs.data());
  brc::tanh_gaussian_backward(given, dactions.data(), s.actions, dlog, dmean.data(), draw.data(), s.dmean,
                              s.draw);
  for (std::int64_t b = 0; b < rows; ++b) {
    const bool hit = b == rows / 2;
    expect(hit ? std::isnan(log_probs[index(b)]) : log_probs[index(b)] == before[index(b)], "NaN", width);
    for (std::int64_t a = 0; a < width; ++a) {
      const std::int64_t at = b * s.dmean + a;
      expect(hit && a == 0 ? std::isnan(dmean[index(at)]) : dmean[index(at)] == dmean_before[index(at)],
             "NaN backward", width);
    }
  }
}

// The slope far out has a relative accuracy, and the log-probability is finite.
void check_far_out() {
  for (const float u : {0.0f, -3.0f, 10.0f, -20.0f, 40.0f, -1e30f}) {
    const float zero = 0.0f, one = 1.0f;
    float action = 0.0f, log_prob = 0.0f, dmean = 0.0f, draw = 0.0f;
    const brc::Gaussian given{1, 1, &u, &zero, 1, 1, &zero};
    brc::tanh_gaussian(given, &action, 1, &log_prob);
    brc::tanh_gaussian_backward(given, &one, 1, 0.0f, &dmean, &draw, 1, 1);
    const double e = std::exp(-2.0 * std::abs(static_cast<double>(u)));
    expect(std::abs(action) <= 1.0f && std::isfinite(log_prob), "far out", 1);
    const double slope = 4.0 * e / ((1.0 + e) * (1.0 + e));
    expect(std::abs(dmean - slope) <= 1e-6 * slope + 1e-40, "slope far out", 1);
  }
}

}  // namespace

int main() {
  for (const std::int64_t width : {1, 2, 6, 7, 15, 16, 17, 24, 61, 255, 256, 257, 300, 600}) {
    check(5, width, {width, width, width, width, width}, 1.0f);
    check(37, width, {2 * width, 2 * width + 1, width + 3, width + 2, 2 * width}, 10.0f);
    check(1, width, {width, width, width, width, width}, 1.0f);
  }
  check_far_out();
  std::puts("policy: all checks passed");
}
