// The categorical passes against their definitions in double precision.
#include "categorical.hpp"

#include <limits>
#include <numeric>
#include <span>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr double V_MAX = 10.0;

void check_projection(std::int64_t atoms) {
  const std::int64_t rows = 5;
  const Floats probs(index(rows * atoms), 1.0f / static_cast<float>(atoms));
  Floats positions = normal(rows * atoms, 8.0f);  // many beyond the support
  positions[0] = INFINITE;
  positions[1] = -INFINITE;
  Floats out(probs.size());
  brc::categorical_projection(rows, atoms, probs.data(), positions.data(), 10.0f, out.data());
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto first = out.begin() + row * atoms;
    expect_close(std::accumulate(first, first + atoms, 0.0), 1.0, 1e-6, "mass of the projection", atoms);
  }
}

// Logits between guards: rows of all members, `stride` apart, one row of guards between two members.
struct Given {
  Floats data;
  std::int64_t members, rows, atoms, stride;

  Given(std::int64_t of_members, std::int64_t of_rows, std::int64_t of_atoms, std::int64_t beyond)
      : members(of_members), rows(of_rows), atoms(of_atoms), stride(of_atoms + beyond) {
    data = guards((members * (rows + 1) - 1) * stride - beyond);
    for (std::int64_t e = 0; e < members; ++e) {
      for (std::int64_t b = 0; b < rows; ++b) {
        for (float& value : at(e, b)) value = 3.0f * normal(1)[0];
      }
    }
  }

  std::span<float> at(std::int64_t e, std::int64_t b) {
    return {data.data() + (e * (rows + 1) + b) * stride, index(atoms)};
  }

  [[nodiscard]] brc::Logits logits() const { return {data.data(), members, (rows + 1) * stride, stride}; }
};

Doubles softmax(std::span<const float> x) {
  const double most = *std::max_element(x.begin(), x.end());
  Doubles out;
  double sum = 0.0;
  for (const float value : x) {
    out.push_back(std::exp(value - most));
    sum += out.back();
  }
  for (double& value : out) value /= sum;
  return out;
}

double atom(std::int64_t k, std::int64_t atoms) {
  return -V_MAX + 2.0 * V_MAX * static_cast<double>(k) / static_cast<double>(atoms - 1);
}

Doubles target_of(Given& next, std::int64_t row, double reward, double discount, double entropy) {
  Doubles target(index(next.atoms));
  for (std::int64_t e = 0; e < next.members; ++e) {
    const Doubles probs = softmax(next.at(e, row));
    for (std::int64_t k = 0; k < next.atoms; ++k) {
      const double position = reward + discount * (atom(k, next.atoms) - entropy);
      const double there =
          (std::clamp(position, -V_MAX, V_MAX) + V_MAX) / (2.0 * V_MAX) * static_cast<double>(next.atoms - 1);
      const auto lower = std::min(static_cast<std::int64_t>(there), next.atoms - 2);
      const double share = there - static_cast<double>(lower);
      const double mass = probs[index(k)] / static_cast<double>(next.members);
      target[index(lower)] += mass * (1.0 - share);
      target[index(lower + 1)] += mass * share;
    }
  }
  return target;
}

void check_bellman(std::int64_t members, std::int64_t next_members, std::int64_t atoms, std::int64_t beyond) {
  const std::int64_t rows = 9, columns = atoms + beyond;
  const float temperature = 0.3f, scale = 0.25f;
  Given now(members, rows, atoms, beyond), next(next_members, rows, atoms, 2 * beyond);
  Floats rewards = normal(rows), discounts(index(rows), 0.97f), log_probs = normal(rows, 5.0f);
  discounts[0] = 0.0f;
  discounts[1] = -0.9f;
  discounts[2] = 1.0f;  // exact hits
  rewards[2] = log_probs[2] = 0.0f;
  rewards[3] = 100.0f;  // beyond the support
  rewards[4] = -100.0f;
  discounts[5] = 1e-3f;
  Floats losses(index(members * rows)), grads = guards(members * rows * columns);
  const auto run = [&](Floats& into, float* gradient) {
    brc::categorical_bellman(rows, atoms, now.logits(), next.logits(), rewards.data(), discounts.data(),
                             log_probs.data(), temperature, static_cast<float>(V_MAX), scale, columns,
                             into.data(), gradient);
  };
  run(losses, grads.data());
  for (std::int64_t b = 0; b < rows; ++b) {
    const double entropy = static_cast<double>(temperature) * log_probs[index(b)];
    const Doubles target = target_of(next, b, rewards[index(b)], discounts[index(b)], entropy);
    for (std::int64_t e = 0; e < members; ++e) {
      const Doubles probs = softmax(now.at(e, b));
      const float* grad = grads.data() + (e * rows + b) * columns;
      double loss = 0.0, sum = 0.0;
      for (std::int64_t k = 0; k < atoms; ++k) {
        loss -= target[index(k)] * std::log(probs[index(k)]);
        // in a float, an index of a thousand has 13 bits behind the point
        expect_close(grad[k], scale * (probs[index(k)] - target[index(k)]),
                     1e-8 * static_cast<double>(atoms) + 1e-6, "gradient", atoms);
        sum += grad[k];
      }
      expect_close(losses[index(e * rows + b)], loss, 1e-7 * static_cast<double>(atoms) + 1e-5,
                   "cross-entropy", atoms);
      expect_close(sum, 0.0, 1e-6, "mass kept", atoms);
      for (std::int64_t k = atoms; k < columns; ++k) expect(grad[k] == 0.0f, "zero beyond", atoms);
    }
  }
  Floats alone(losses.size());
  run(alone, nullptr);
  expect(alone == losses, "losses alone", atoms);

  // each NaN spoils its row only; one among the logits spoils one member of it
  rewards[1] = NOT_A_NUMBER;
  discounts[2] = NOT_A_NUMBER;
  log_probs[3] = NOT_A_NUMBER;
  next.at(next_members - 1, 4)[index(atoms / 2)] = NOT_A_NUMBER;
  now.at(0, 5)[index(atoms - 1)] = NOT_A_NUMBER;
  log_probs[6] = INFINITE;  // and beyond the support without NaN
  const Floats before = losses, grads_before = grads;
  run(losses, grads.data());
  for (std::int64_t e = 0; e < members; ++e) {
    for (std::int64_t b = 0; b < rows; ++b) {
      const bool spoilt = (b >= 1 && b <= 4) || (b == 5 && e == 0);
      const std::int64_t at = e * rows + b;
      if (b == 6) {
        expect(std::isfinite(losses[index(at)]), "infinite log-probability", atoms);
        continue;
      }
      expect(spoilt ? std::isnan(losses[index(at)]) : losses[index(at)] == before[index(at)], "NaN", atoms);
      for (std::int64_t k = 0; k < columns; ++k) {
        const float grad = grads[index(at * columns + k)];
        const bool nan = spoilt && k < atoms;
        expect(nan ? std::isnan(grad) : grad == grads_before[index(at * columns + k)], "NaN grad", atoms);
      }
    }
  }
}

void check_expected(std::int64_t members, std::int64_t atoms, std::int64_t beyond) {
  const std::int64_t rows = 4, columns = atoms + beyond;
  const float scale = -0.5f;
  Given now(members, rows, atoms, beyond);
  const Floats z = normal(atoms);
  Floats values(index(members * rows)), grads = guards(members * rows * columns), alone(values);
  brc::expected_value(rows, atoms, now.logits(), z.data(), scale, columns, values.data(), grads.data());
  brc::expected_value(rows, atoms, now.logits(), z.data(), scale, columns, alone.data(), nullptr);
  expect(alone == values, "values alone", atoms);
  for (std::int64_t e = 0; e < members; ++e) {
    for (std::int64_t b = 0; b < rows; ++b) {
      const Doubles probs = softmax(now.at(e, b));
      const double value = std::inner_product(probs.begin(), probs.end(), z.begin(), 0.0);
      const float* grad = grads.data() + (e * rows + b) * columns;
      expect_close(values[index(e * rows + b)], value, 1e-6, "expected value", atoms);
      for (std::int64_t k = 0; k < columns; ++k) {
        const double exact = k < atoms ? scale * probs[index(k)] * (z[index(k)] - value) : 0.0;
        expect_close(grad[k], exact, 1e-6, "gradient of the expected value", atoms);
      }
    }
  }
  now.at(0, 1)[0] = NOT_A_NUMBER;
  brc::expected_value(rows, atoms, now.logits(), z.data(), scale, columns, values.data(), grads.data());
  for (std::size_t at = 0; at < values.size(); ++at) {
    expect(at == 1 ? std::isnan(values[at]) : values[at] == alone[at], "NaN in its row", atoms);
  }
}

}  // namespace

int main() {
  for (const std::int64_t atoms : {2, 3, 7, 8, 15, 16, 17, 33, 64, 101, 128, 512, 1001}) {
    check_projection(atoms);
    check_bellman(1, 1, atoms, 0);
    check_bellman(2, 2, atoms, 3);
    check_bellman(3, 5, atoms, 11);
    check_expected(1, atoms, 0);
    check_expected(2, atoms, 5);
  }
  std::puts("categorical: all checks passed");
}
