// Bias + LayerNorm against its definition and derivative in double precision.
#include "layer_norm.hpp"

#include <limits>
#include <tuple>
#include <utility>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

constexpr double EPS = 1e-6;

struct Case {
  brc::RowShape shape;
  bool relu;
  bool residual;
  std::int64_t parameter_stride;
  std::int64_t grad_stride;
};

struct Truth {
  Doubles y, mean, rstd, dx, dbias, dweight, dshift;
};

// Where ReLU bends within rounding errors, `dy` is set to 0.
Truth truth(const Case& c, const Floats& x, Floats& dy, const Floats& residual, const Floats& bias,
            const Floats& weight, const Floats& shift) {
  const auto [networks, batch, width] = c.shape;
  const auto count = static_cast<double>(width);
  Truth out;
  out.y.resize(x.size());
  out.dx.resize(x.size());
  for (Doubles* sums : {&out.dbias, &out.dweight, &out.dshift}) sums->resize(index(networks * width));
  for (std::int64_t row = 0; row < networks * batch; ++row) {
    const std::int64_t p = row / batch * c.parameter_stride, at = row * width, d = row / batch * width;
    Doubles h, g;
    double mean = 0.0, variance = 0.0, sum = 0.0, along = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
      h.push_back(static_cast<double>(x[index(at + i)]) + bias[index(p + i)]);
      mean += h.back() / count;
    }
    for (const double value : h) variance += (value - mean) * (value - mean) / count;
    const double scale = 1.0 / std::sqrt(variance + EPS);
    for (std::int64_t i = 0; i < width; ++i) {
      const double normed = (h[index(i)] - mean) * scale;
      double y = normed * weight[index(p + i)] + shift[index(p + i)];
      const bool on = !c.relu || y > 0.0;
      if (c.relu && std::abs(y) < 1e-5) dy[index(at + i)] = 0.0f;
      if (!on) y = 0.0;
      out.y[index(at + i)] = y + (c.residual ? residual[index(at + i)] : 0.0);
      const double dshift = on ? dy[index(at + i)] : 0.0;
      out.dshift[index(d + i)] += dshift;
      out.dweight[index(d + i)] += dshift * normed;
      g.push_back(dshift * weight[index(p + i)]);
      sum += g.back();
      along += g.back() * normed;
    }
    for (std::int64_t i = 0; i < width; ++i) {
      const double normed = (h[index(i)] - mean) * scale;
      out.dx[index(at + i)] = scale * (g[index(i)] - sum / count - normed * along / count);
      out.dbias[index(d + i)] += out.dx[index(at + i)];
    }
    out.mean.push_back(mean);
    out.rstd.push_back(scale);
  }
  return out;
}

void expect_all(const Floats& mine, const Doubles& exact, double tolerance, const char* what,
                std::int64_t width) {
  for (std::size_t at = 0; at < mine.size(); ++at) {
    expect_close(mine[at], exact[at], tolerance, what, width);
  }
}

void check(const Case& c) {
  const auto [networks, batch, width] = c.shape;
  const std::int64_t rows = networks * batch, size = rows * width;
  const std::int64_t last = (networks - 1) * c.parameter_stride + width;
  const Floats x = normal(size, 3.0f), residual = normal(size);
  Floats dy = normal(size);
  const Floats bias = normal(last), weight = normal(last), shift = normal(last);
  Floats y(x.size()), mean(index(rows)), rstd(mean);
  const brc::Norm<float> norm = {c.shape,      x.data(),           bias.data(),        weight.data(),
                                 shift.data(), c.parameter_stride, c.parameter_stride, c.relu};
  brc::NormForward<float>(norm, c.residual ? residual.data() : nullptr, 1e-6f, y.data(), mean.data(),
                          rstd.data())
      .run();
  const Truth exact = truth(c, x, dy, residual, bias, weight, shift);
  // Two numbers that nearly agree have a variance of few bits.
  const double tolerance = width == 2 ? 1e-3 : 3e-5;
  expect_all(mean, exact.mean, 1e-6, "mean", width);
  expect_all(rstd, exact.rstd, tolerance, "rstd", width);
  expect_all(y, exact.y, tolerance, "forward", width);

  Floats dx(x.size());
  Floats dbias = guards(networks * c.grad_stride), dweight(dbias), dshift(dbias);
  const auto backward = [&](const Floats& given, Floats& out, bool wanted) {
    brc::NormGradients<float> into = {};
    if (wanted) into = {dbias.data(), dweight.data(), dshift.data(), c.grad_stride, c.grad_stride};
    brc::NormBackward<float>(norm, mean.data(), rstd.data(), given.data(), out.data(), into).run();
  };
  backward(dy, dx, true);
  expect_all(dx, exact.dx, tolerance, "gradient", width);
  for (const auto& [mine, wanted, what] : {std::tuple(&dbias, &exact.dbias, "gradient of the bias"),
                                           std::tuple(&dweight, &exact.dweight, "gradient of the weight"),
                                           std::tuple(&dshift, &exact.dshift, "gradient of the shift")}) {
    expect_guards(*mine, networks, width, c.grad_stride, what);
    for (std::int64_t n = 0; n < networks; ++n) {
      for (std::int64_t i = 0; i < width; ++i) {
        expect_close((*mine)[index(n * c.grad_stride + i)], (*wanted)[index(n * width + i)],
                     tolerance * std::sqrt(static_cast<double>(batch)), what, width);
      }
    }
  }
  Floats alone(x.size()), in_place = dy;
  backward(dy, alone, false);
  expect_all(alone, exact.dx, tolerance, "gradient of the input alone", width);
  backward(in_place, in_place, true);
  expect(in_place == dx, "gradient over the incoming one", width);
}

// A NaN stays in its row; the rows beside it, in the same sweep, do not change.
void check_nan(std::int64_t width) {
  const std::int64_t batch = 7;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Floats parameters(index(width), 0.5f), dy = normal(batch * width);
  const Floats clean = normal(batch * width);
  Floats spoilt = clean;
  spoilt[index(2 * width + width / 2)] = nan;
  Floats y[2], dx[2];
  for (const int run : {0, 1}) {
    Floats mean(index(batch)), rstd(mean);
    const Floats& x = run == 0 ? clean : spoilt;
    y[run] = dx[run] = Floats(x.size());
    const float* vector = parameters.data();
    const brc::Norm<float> norm = {{1, batch, width}, x.data(), vector, vector, vector, width, width, true};
    brc::NormForward<float>(norm, nullptr, 1e-6f, y[run].data(), mean.data(), rstd.data()).run();
    brc::NormBackward<float>(norm, mean.data(), rstd.data(), dy.data(), dx[run].data(), {}).run();
  }
  for (std::int64_t at = 0; at < batch * width; ++at) {
    const bool hit = at / width == 2;
    expect(hit ? std::isnan(y[1][index(at)]) : y[0][index(at)] == y[1][index(at)], "NaN forward", width);
    expect(hit ? std::isnan(dx[1][index(at)]) : dx[0][index(at)] == dx[1][index(at)], "NaN backward", width);
  }
}

// Networks that share one bias compute as if each had a copy of it.
void check_shared_bias(std::int64_t width) {
  const std::int64_t networks = 3, batch = 5, count = networks * batch * width;
  const Floats x = normal(count), dy = normal(count), bias = normal(width),
               vectors = normal(networks * width);
  Floats copies;
  for (std::int64_t n = 0; n < networks; ++n) copies.insert(copies.end(), bias.begin(), bias.end());
  Floats y[2], dx[2], dbias[2], dweight[2];
  for (const int run : {0, 1}) {
    const Floats& given = run == 0 ? copies : bias;
    const std::int64_t stride = run == 0 ? width : 0;
    Floats mean(index(networks * batch)), rstd(mean), dshift(index(networks * width));
    y[run] = dx[run] = Floats(index(count));
    dbias[run] = guards(run == 0 ? networks * width : width);
    dweight[run] = dshift;
    const brc::Norm<float> norm = {{networks, batch, width}, x.data(), given.data(), vectors.data(),
                                   vectors.data(),           stride,   width,        false};
    brc::NormForward<float>(norm, nullptr, 1e-6f, y[run].data(), mean.data(), rstd.data()).run();
    const brc::NormGradients<float> into = {dbias[run].data(), dweight[run].data(), dshift.data(), stride,
                                            width};
    brc::NormBackward<float>(norm, mean.data(), rstd.data(), dy.data(), dx[run].data(), into).run();
  }
  expect(y[0] == y[1] && dx[0] == dx[1] && dweight[0] == dweight[1], "shared bias", width);
  expect(std::equal(dbias[1].begin(), dbias[1].begin() + width, dbias[0].end() - width),
         "gradient of a shared bias", width);
}

}  // namespace

int main() {
  for (const std::int64_t width : {2, 3, 7, 8, 15, 16, 17, 33, 64, 101, 128, 129, 512}) {
    for (const auto& [relu, residual] : {std::pair(false, false), {true, false}, {false, true}}) {
      check({{2, 7, width}, relu, residual, width, width});
      check({{3, 4, width}, relu, residual, 3 * width + 5, 2 * width + 1});
      check({{1, 1, width}, relu, residual, width, width + 3});
      if (width > 2) check({{2, 2 * brc::PIECE + 3, width}, relu, residual, width, width});
    }
    check_nan(width);
    check_shared_bias(width);
  }
  std::puts("layer norm: all checks passed");
}
