// What the tests of the float32 kernels share. Buffers are exactly as large as the kernels may touch, for the
// sanitizers, or hold guard values where rows lie further apart than they are wide.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace checks {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr float GUARD = -12345.0f;

inline std::mt19937 rng(0);

inline std::size_t index(std::int64_t at) {
  return static_cast<std::size_t>(at);
}

inline Floats normal(std::int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> draw;
  Floats out(index(count));
  for (float& value : out) value = scale * draw(rng);
  return out;
}

inline Floats guards(std::int64_t count) {
  return Floats(index(count), GUARD);
}

inline void expect(bool holds, const char* what, std::int64_t size) {
  if (holds) return;
  std::printf("failed: %s at size %lld\n", what, static_cast<long long>(size));
  std::exit(1);
}

inline void expect_close(double mine, double exact, double tolerance, const char* what, std::int64_t size) {
  if (std::abs(mine - exact) <= tolerance * (1.0 + std::abs(exact))) return;
  std::printf("failed: %s at size %lld: %.9g, expected %.9g\n", what, static_cast<long long>(size), mine,
              exact);
  std::exit(1);
}

// Everything but the first `width` values of each of `rows` rows, `stride` apart, is still the guard.
inline void expect_guards(const Floats& x, std::int64_t rows, std::int64_t width, std::int64_t stride,
                          const char* what) {
  for (std::int64_t at = 0; at < static_cast<std::int64_t>(x.size()); ++at) {
    const bool inside = at / stride < rows && at % stride < width;
    expect(inside || x[index(at)] == GUARD, what, width);
  }
}

}  // namespace checks
