// Packed inputs and the embedding's gradient against their definition in double precision.
#include "inputs.hpp"

#include <stdexcept>

#include "kernel_checks.hpp"

namespace {

using namespace checks;

void check(std::int64_t tasks, std::int64_t width, bool l1) {
  const std::int64_t rows = 11, members = 2, gap = 3, full = 4 + 2 + width + 5;
  const Floats observations = normal(rows * (4 + gap)), actions = normal(rows * 2),
               table = normal(tasks * width), grad = normal(members * rows * (width + gap));
  std::vector<std::int64_t> ids(index(rows));
  for (std::int64_t& id : ids) id = static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(tasks));
  const brc::Embedding embedding = {table.data(), tasks, width, ids.data(), l1};
  Floats out = guards(rows * full), dtable = guards(tasks * width);
  brc::pack_inputs<float>(rows, {observations.data(), 4, 4 + gap}, {actions.data(), 2, 2}, embedding,
                          out.data(), full);
  brc::embedding_gradient<float>(members, rows, grad.data(), rows * (width + gap), width + gap, embedding,
                                 dtable.data());
  Doubles length(index(tasks)), sums(index(tasks * width));
  for (std::int64_t t = 0; t < tasks; ++t) {
    for (std::int64_t i = 0; i < width; ++i) {
      const double e = table[index(t * width + i)];
      length[index(t)] += l1 ? std::abs(e) : e * e;
    }
    if (!l1) length[index(t)] = std::sqrt(length[index(t)]);
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t t = ids[index(row)];
    for (std::int64_t i = 0; i < full; ++i) {
      double exact = 0.0;
      if (i < 4) {
        exact = observations[index(row * (4 + gap) + i)];
      } else if (i < 6) {
        exact = actions[index(row * 2 + i - 4)];
      } else if (i < 6 + width) {
        exact = table[index(t * width + i - 6)] / length[index(t)];
      }
      expect_close(out[index(row * full + i)], exact, 1e-6, "packed input", width);
    }
    for (std::int64_t m = 0; m < members; ++m) {
      for (std::int64_t i = 0; i < width; ++i) {
        sums[index(t * width + i)] += grad[index((m * rows + row) * (width + gap) + i)];
      }
    }
  }
  for (std::int64_t t = 0; t < tasks; ++t) {
    double along = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
      along += table[index(t * width + i)] / length[index(t)] * sums[index(t * width + i)];
    }
    for (std::int64_t i = 0; i < width; ++i) {
      const double e = table[index(t * width + i)];
      const double direction = l1 ? (e > 0.0 ? 1.0 : -1.0) : e / length[index(t)];
      const double exact = (sums[index(t * width + i)] - direction * along) / length[index(t)];
      expect_close(dtable[index(t * width + i)], exact, 1e-5, "gradient of the table", width);
    }
  }
}

void check_refusal(std::int64_t id) {
  const Floats table = normal(2 * 3), rows = normal(1);
  const brc::Embedding embedding = {table.data(), 2, 3, &id, false};
  Floats out(4);
  bool refused = false;
  try {
    brc::pack_inputs<float>(1, {rows.data(), 1, 1}, {}, embedding, out.data(), 4);
  } catch (const std::out_of_range&) {
    refused = true;
  }
  expect(refused, "a task that does not exist", id);
}

}  // namespace

int main() {
  for (const std::int64_t width : {1, 3, 16, 33}) {
    for (const bool l1 : {false, true}) {
      check(1, width, l1);
      check(5, width, l1);
    }
  }
  for (const std::int64_t id : {-1, 2}) check_refusal(id);
  std::puts("inputs: all checks passed");
}
