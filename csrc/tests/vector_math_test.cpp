// exp, log and tanh inside of vector loops against double precision, over all magnitudes of float.
#include "vector_math.hpp"

#include <bit>
#include <limits>

#include "kernel_checks.hpp"

namespace {

using namespace checks;
namespace math = brc::vector_math;

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr double SMALLEST = std::numeric_limits<float>::min();

BRC_VECTOR_CLONES
void exp_of(std::int64_t count, const float* __restrict x, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = math::exp(x[i]);
}

BRC_VECTOR_CLONES
void log_of(std::int64_t count, const float* __restrict x, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = math::log(x[i]);
}

BRC_VECTOR_CLONES
void tanh_of(std::int64_t count, const float* __restrict x, float* __restrict value, float* __restrict slope,
             float* __restrict steepness) {
  for (std::int64_t i = 0; i < count; ++i) {
    const math::Tanh t = math::tanh(x[i]);
    value[i] = t.value;
    slope[i] = t.slope;
    steepness[i] = t.steepness;
  }
}

BRC_VECTOR_CLONES
float maximum_of(const float* x, std::int64_t count) {
  return math::maximum(x, count);
}

// The distance in units in the last place of the exact number as a float.
double ulps(double mine, double exact) {
  int exponent = 0;
  std::frexp(exact, &exponent);
  return std::abs(mine - exact) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

void expect_within(double limit, float x, float mine, double exact, const char* what) {
  const bool fits = std::abs(exact) > std::numeric_limits<float>::max()
                        ? std::abs(mine) >= std::numeric_limits<float>::max() && (mine > 0) == (exact > 0)
                        : ulps(mine, exact) <= limit;
  if (fits) return;
  std::printf("failed: %s of %.9g is %.9g, expected %.9g\n", what, x, mine, exact);
  std::exit(1);
}

void check(const Floats& x) {
  const auto count = static_cast<std::int64_t>(x.size());
  Floats exps(x.size()), logs(x.size()), value(x.size()), slope(x.size()), steepness(x.size());
  exp_of(count, x.data(), exps.data());
  log_of(count, x.data(), logs.data());
  tanh_of(count, x.data(), value.data(), slope.data(), steepness.data());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i];
    if (std::isnan(exact)) {
      for (const Floats* out : {&exps, &logs, &value, &slope, &steepness}) {
        expect(std::isnan((*out)[i]), "NaN is kept", count);
      }
      continue;
    }
    expect_within(2.0, x[i], exps[i], std::exp(exact), "exp");
    if (exact >= SMALLEST) expect_within(2.0, x[i], logs[i], std::log(exact), "log");
    if (exact < 0.0) expect(std::isnan(logs[i]), "log of a negative number", count);
    if (exact >= 0.0 && exact < SMALLEST) expect(logs[i] == -INFINITE, "log of 0", count);
    const double e = std::exp(-2.0 * std::abs(exact));
    expect_close(value[i], std::tanh(exact), 6e-8, "tanh", count);
    // a subnormal exponential has fewer bits
    const double exact_slope = 4.0 * e / ((1.0 + e) * (1.0 + e));
    if (exact_slope > 8.0 * SMALLEST) expect_within(6.0, x[i], slope[i], exact_slope, "slope of tanh");
    if (std::abs(exact) < 1e38) {
      expect_close(steepness[i], 2.0 * (std::abs(exact) + std::log1p(e)), 3e-7, "steepness", count);
    }
  }
}

void check_maximum(std::int64_t count) {
  Floats x = normal(count, 1e3f);
  for (float& value : x) value -= 2e3f;  // mostly negative
  expect(maximum_of(x.data(), count) == *std::max_element(x.begin(), x.end()), "maximum", count);
  x[index(count / 2)] = INFINITE;
  expect(maximum_of(x.data(), count) == INFINITE, "infinite maximum", count);
  std::fill(x.begin(), x.end(), -INFINITE);
  expect(maximum_of(x.data(), count) == -INFINITE, "maximum of -infinity", count);
}

}  // namespace

int main() {
  constexpr std::uint32_t COUNT = 4099;
  constexpr std::uint32_t STEP = 257;  // odd: every pattern of the last bits occurs
  for (std::uint64_t first = 0; first < std::uint64_t{1} << 32; first += std::uint64_t{COUNT} * STEP) {
    Floats x;
    for (std::uint32_t i = 0; i < COUNT; ++i) {
      x.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(first) + i * STEP));
    }
    check(x);
  }
  check({INFINITE, -INFINITE, 0.0f, 1.0f, 88.7228317f, 88.7229f, -103.97f, -104.1f, -87.4f});
  for (const std::int64_t count : {1, 7, 16, 101}) check_maximum(count);
  std::puts("vector math: all checks passed");
}
