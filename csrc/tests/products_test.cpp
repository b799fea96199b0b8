// Products against sums in double precision, for any shape and layout, and for any number of threads.
#include "products.hpp"

#include <cstring>

#include "kernel_checks.hpp"
#include "numbers.hpp"
#include "workers.hpp"

namespace {

using namespace checks;

std::int64_t drawn(std::int64_t least, std::int64_t most) {
  return std::uniform_int_distribution<std::int64_t>(least, most)(rng);
}

// Numbers, also as bfloat16, in memory that ends with them.
struct Numbers {
  Numbers(std::int64_t count, bool low) : floats(normal(count)), halves(index(count)) {
    for (std::size_t at = 0; at < floats.size(); ++at) {
      halves[at] = brc::from_float<brc::BFloat16>(floats[at]);
      if (low) floats[at] = brc::to_float(halves[at]);
    }
  }
  [[nodiscard]] const void* data(bool low) const {
    return low ? static_cast<const void*>(halves.data()) : floats.data();
  }
  Floats floats;
  std::vector<brc::BFloat16> halves;
};

struct Case {
  brc::ProductShape shape;
  bool low, low_out, a_turned, b_turned, bias, accumulate;
  std::int64_t gap;  // between the rows of out
};

void check(const Case& c) {
  const auto [networks, rows, columns, depth] = c.shape;
  const auto kind = [](bool low) { return low ? brc::Number::bfloat16 : brc::Number::float32; };
  const Numbers a(networks * rows * depth, c.low), b(networks * depth * columns, c.low);
  const Floats bias = normal(networks * columns);
  const std::int64_t stride = columns + c.gap, size = networks * rows * stride;
  Numbers out(size, c.low_out);
  const Floats before = out.floats;
  void* to = c.low_out ? static_cast<void*>(out.halves.data()) : out.floats.data();
  const brc::Factor left = {a.data(c.low), rows * depth, c.a_turned ? 1 : depth, c.a_turned ? rows : 1};
  const brc::Factor right = {b.data(c.low), depth * columns, c.b_turned ? 1 : columns,
                             c.b_turned ? depth : 1};
  brc::multiply(c.shape, kind(c.low), left, right, {c.bias ? bias.data() : nullptr, columns},
                {to, kind(c.low_out), rows * stride, stride, c.accumulate});
  const double unit = c.low_out ? 4e-3 : 1e-6;
  for (std::int64_t n = 0; n < networks; ++n) {
    for (std::int64_t m = 0; m < rows; ++m) {
      for (std::int64_t i = 0; i < stride; ++i) {
        const std::size_t at = index((n * rows + m) * stride + i);
        const float mine = c.low_out ? brc::to_float(out.halves[at]) : out.floats[at];
        if (i >= columns) {
          expect(mine == before[at], "what lies between the rows", columns);
          continue;
        }
        double exact = c.accumulate ? before[at] : 0.0, size_of_terms = std::abs(exact);
        if (c.bias) exact += bias[index(n * columns + i)];
        size_of_terms += std::abs(exact);
        for (std::int64_t k = 0; k < depth; ++k) {
          const double x = a.floats[index(n * rows * depth + (c.a_turned ? k * rows + m : m * depth + k))];
          const double y =
              b.floats[index(n * depth * columns + (c.b_turned ? i * depth + k : k * columns + i))];
          exact += x * y;
          size_of_terms += std::abs(x * y);
        }
        expect(std::abs(mine - exact) <= unit * (1.0 + size_of_terms), "product", depth);
      }
    }
  }
}

// The same bits with any number of threads.
void check_threads(bool low) {
  const brc::ProductShape shape = {2, 300, 200, 700};
  const Numbers a(2 * 300 * 700, low), b(2 * 700 * 200, low);
  Floats out[3];
  for (const int threads : {1, 2, 5}) {
    brc::set_threads(threads);
    Floats& own = out[threads / 2];
    own = guards(2 * 300 * 200);
    const auto kind = low ? brc::Number::bfloat16 : brc::Number::float32;
    brc::multiply(shape, kind, {a.data(low), 300 * 700, 700, 1}, {b.data(low), 700 * 200, 200, 1},
                  {nullptr, 0}, {own.data(), brc::Number::float32, 300 * 200, 200, false});
  }
  brc::set_threads(1);
  expect(out[0] == out[1] && out[0] == out[2], "bits with several threads", 700);
}

// A NaN reaches its row (of a) or its column (of b), and nothing else.
void check_nan() {
  const brc::ProductShape shape = {1, 20, 40, 17};
  for (const bool in_a : {true, false}) {
    Floats a = normal(20 * 17), b = normal(17 * 40), out = guards(20 * 40);
    (in_a ? a[3 * 17 + 2] : b[2 * 40 + 5]) = std::nanf("");
    brc::multiply(shape, brc::Number::float32, {a.data(), 0, 17, 1}, {b.data(), 0, 40, 1}, {nullptr, 0},
                  {out.data(), brc::Number::float32, 0, 40, false});
    for (std::int64_t at = 0; at < 20 * 40; ++at) {
      expect(std::isnan(out[index(at)]) == (in_a ? at / 40 == 3 : at % 40 == 5), "NaN", at);
    }
  }
}

}  // namespace

int main() {
  for (const bool low : {false, true}) {
    if (!brc::multiplies(low ? brc::Number::bfloat16 : brc::Number::float32)) {
      std::puts(low ? "products: no bfloat16 on this processor" : "products: none on this processor");
      continue;
    }
    for (int repeat = 0; repeat < 400; ++repeat) {
      brc::set_threads(repeat % 3 + 1);
      const std::int64_t deepest = repeat % 20 == 0 ? 1500 : 80;
      const brc::ProductShape shape = {drawn(1, 3), drawn(1, 150), drawn(1, 90), drawn(1, deepest)};
      check({shape, low, low && drawn(0, 1) == 1, drawn(0, 1) == 1, drawn(0, 1) == 1, drawn(0, 1) == 1,
             drawn(0, 1) == 1, drawn(0, 2)});
    }
    check({{1, 3, 600, 40}, low, false, false, false, true, false, 0});
    check_threads(low);
  }
  if (brc::multiplies(brc::Number::float32)) check_nan();
  std::puts("products: all checks passed");
}
