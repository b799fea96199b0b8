// Sums over rows against those in double precision.
#include "row_sums.hpp"

#include "kernel_checks.hpp"

namespace {

using namespace checks;

void check(std::int64_t width) {
  const std::int64_t networks = 2, rows = 37, stride = width + 3;
  const Floats x = normal(networks * rows * width);
  std::vector<brc::BFloat16> low(x.size()), low_out(index(networks * stride));
  Floats rounded(x.size()), out = guards(networks * stride);
  for (std::size_t i = 0; i < x.size(); ++i) {
    low[i] = brc::from_float<brc::BFloat16>(x[i]);
    rounded[i] = brc::to_float(low[i]);
  }
  std::vector<brc::BFloat16> same(x.size());
  brc::round_all(static_cast<std::int64_t>(x.size()), x.data(), same.data());
  for (std::size_t i = 0; i < x.size(); ++i) expect(same[i].bits == low[i].bits, "rounding", width);
  brc::sum_rows<float>({networks, rows, width}, x.data(), out.data(), stride);
  brc::sum_rows<brc::BFloat16>({networks, rows, width}, low.data(), low_out.data(), stride);
  expect_guards(out, networks, width, stride, "what lies between the sums");
  for (std::int64_t n = 0; n < networks; ++n) {
    for (std::int64_t i = 0; i < width; ++i) {
      double exact = 0.0, exact_low = 0.0;
      for (std::int64_t row = 0; row < rows; ++row) {
        exact += x[index((n * rows + row) * width + i)];
        exact_low += rounded[index((n * rows + row) * width + i)];
      }
      expect_close(out[index(n * stride + i)], exact, 1e-5, "sum over rows", width);
      expect_close(brc::to_float(low_out[index(n * stride + i)]), exact_low, 4e-3, "sum in bfloat16", width);
    }
  }
}

}  // namespace

int main() {
  for (const std::int64_t width : {1, 15, 16, 101, 255, 256, 257, 600}) check(width);
  std::puts("row sums: all checks passed");
}
