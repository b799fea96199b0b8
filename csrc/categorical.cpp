#include "categorical.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "scratch.hpp"
#include "vector_clones.hpp"
#include "vector_math.hpp"
#include "workers.hpp"

namespace brc {
namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float FAR_BELOW = -200.0f;  // its exponential is 0

// Up to the next multiple of 16, of which loops are whole vectors.
BRC_INLINE std::int64_t padded(std::int64_t count) {
  return (count + 15) / 16 * 16;
}

// out[k] = x[k] - max(x), and far below beyond `count` up to its padded length.
BRC_INLINE void below_maximum(std::int64_t count, const float* __restrict x, float* __restrict out) {
  const float most = vector_math::maximum(x, count);
  for (std::int64_t k = 0; k < count; ++k) out[k] = x[k] - most;
  for (std::int64_t k = count; k < padded(count); ++k) out[k] = FAR_BELOW;
}

// x[k] = exp(x[k]), whose sum is returned, over the padded length.
BRC_INLINE float exponentials(std::int64_t count, float* x) {
  const std::int64_t length = padded(count);
  float sum = 0.0f;
  for (std::int64_t k = 0; k < length; ++k) {
    x[k] = vector_math::exp(x[k]);
    sum += x[k];
  }
  return sum;
}

// The support of the distributions.
struct Atoms {
  std::int64_t count;
  float v_max;

  [[nodiscard]] float spacing() const { return 2.0f * v_max / static_cast<float>(count - 1); }
};

// Of one row; each part has the padded length.
struct RowParts {
  float* mass;     // of the next state's distribution, then the target
  float* work;     // logits below their maximum, exponentials, indices
  float* sums[4];  // lower and upper shares of the even atoms and of the odd ones
};

// mass[k] = mean over members of softmax(next_logits)_k; the scale of its rows is 1.
BRC_INLINE void mean_softmax(std::int64_t atoms, Logits logits, std::int64_t row, const RowParts& parts) {
  const std::int64_t length = padded(atoms);
  float* __restrict mass = parts.mass;
  float* __restrict work = parts.work;
  std::fill_n(mass, length, 0.0f);
  for (std::int64_t member = 0; member < logits.members; ++member) {
    below_maximum(atoms, logits.data + member * logits.member_stride + row * logits.row_stride, work);
    const float share = 1.0f / (exponentials(atoms, work) * static_cast<float>(logits.members));
    for (std::int64_t k = 0; k < length; ++k) mass[k] += share * work[k];
  }
}

// Replaces `mass` by its projection from reward + discount * (z_k - entropy) onto the atoms z_k.
BRC_INLINE void project(Atoms atoms, float reward, float discount, float entropy, const RowParts& parts) {
  const std::int64_t count = atoms.count;
  const std::int64_t length = padded(count);
  const float v_max = atoms.v_max;
  const float spacing = atoms.spacing();
  const auto last = static_cast<float>(count - 1);
  const auto middle = static_cast<std::int32_t>(count / 2);
  float* __restrict mass = parts.mass;
  float* __restrict index = parts.work;
  std::int32_t spoilt = 0;
  for (std::int32_t k = 0; k < static_cast<std::int32_t>(length); ++k) {
    const auto from_below = static_cast<float>(k);
    const float atom = k < middle ? from_below * spacing - v_max : v_max - (last - from_below) * spacing;
    const float position = reward + discount * (atom - entropy);
    const float there = (position + v_max) / spacing;
    const float above = there > 0.0f ? there : 0.0f;  // NaN becomes 0, which is safe to round
    index[k] = above < last ? above : last;
    spoilt |= position != position || mass[k] != mass[k] ? 1 : 0;
  }
  if (spoilt != 0) {
    std::fill_n(mass, count, NOT_A_NUMBER);
    return;
  }
  // Neighbours often add to one atom, and a sum in memory waits for the one before: hence four sums apart.
  for (float* sums : parts.sums) std::fill_n(sums, length, 0.0f);
  const auto add = [&](std::int64_t k, float* lower_sums, float* upper_sums) {
    const auto lower = static_cast<std::int64_t>(index[k]);  // index is not negative
    const float upper_mass = mass[k] * (index[k] - static_cast<float>(lower));
    lower_sums[lower] += mass[k] - upper_mass;
    upper_sums[lower] += upper_mass;
  };
  std::int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    add(k, parts.sums[0], parts.sums[1]);
    add(k + 1, parts.sums[2], parts.sums[3]);
  }
  if (k < count) add(k, parts.sums[0], parts.sums[1]);
  const float* lower_even = parts.sums[0];
  const float* upper_even = parts.sums[1];
  const float* lower_odd = parts.sums[2];
  const float* upper_odd = parts.sums[3];
  mass[0] = lower_even[0] + lower_odd[0];  // the last atom has no upper share: it is 0
  for (std::int64_t j = 1; j < count; ++j) {
    mass[j] = lower_even[j] + lower_odd[j] + upper_even[j - 1] + upper_odd[j - 1];
  }
}

BRC_VECTOR_CLONES
void bellman_rows(std::int64_t start, std::int64_t stop, std::int64_t rows, std::int64_t atoms, Logits logits,
                  Logits next_logits, const float* rewards, const float* discounts, const float* log_probs,
                  float temperature, float v_max, float scale, std::int64_t columns, float* losses,
                  float* grads) {
  const std::int64_t length = padded(atoms);
  thread_local Scratch memory;
  float* const scratch = memory.floats(6 * length);
  const RowParts parts = {
      scratch,
      scratch + length,
      {scratch + 2 * length, scratch + 3 * length, scratch + 4 * length, scratch + 5 * length}};
  const float* __restrict target = parts.mass;
  float* __restrict work = parts.work;
  for (std::int64_t row = start; row < stop; ++row) {
    mean_softmax(atoms, next_logits, row, parts);
    project({atoms, v_max}, rewards[row], discounts[row], temperature * log_probs[row], parts);
    float mass = 0.0f;
    for (std::int64_t k = 0; k < atoms; ++k) mass += target[k];
    for (std::int64_t member = 0; member < logits.members; ++member) {
      below_maximum(atoms, logits.data + member * logits.member_stride + row * logits.row_stride, work);
      float along = 0.0f;
      for (std::int64_t k = 0; k < atoms; ++k) along += target[k] * work[k];
      const float sum = exponentials(atoms, work);
      losses[member * rows + row] = mass * vector_math::log(sum) - along;
      if (grads == nullptr) continue;
      float* __restrict grad = grads + (member * rows + row) * columns;
      const float share = scale / sum;
      for (std::int64_t k = 0; k < atoms; ++k) grad[k] = share * work[k] - scale * target[k];
      std::fill(grad + atoms, grad + columns, 0.0f);
    }
  }
}

BRC_VECTOR_CLONES
void expected_rows(std::int64_t start, std::int64_t stop, std::int64_t rows, std::int64_t atoms,
                   Logits logits, const float* atom_values, float scale, std::int64_t columns, float* values,
                   float* grads) {
  constexpr std::int64_t CHUNK = 512;
  float work[CHUNK];
  for (std::int64_t member = 0; member < logits.members; ++member) {
    for (std::int64_t row = start; row < stop; ++row) {
      const float* __restrict x = logits.data + member * logits.member_stride + row * logits.row_stride;
      float* __restrict grad = grads == nullptr ? nullptr : grads + (member * rows + row) * columns;
      const float most = vector_math::maximum(x, atoms);
      float sum = 0.0f, along = 0.0f;
      for (std::int64_t at = 0; at < atoms; at += CHUNK) {
        const std::int64_t here = std::min(CHUNK, atoms - at);
        for (std::int64_t k = 0; k < here; ++k) work[k] = x[at + k] - most;
        for (std::int64_t k = here; k < padded(here); ++k) work[k] = FAR_BELOW;
        sum += exponentials(here, work);
        for (std::int64_t k = 0; k < here; ++k) along += work[k] * atom_values[at + k];
        if (grad != nullptr) std::copy_n(work, here, grad + at);
      }
      const float value = along / sum;
      values[member * rows + row] = value;
      if (grad == nullptr) continue;
      const float share = scale / sum;
      for (std::int64_t k = 0; k < atoms; ++k) grad[k] = share * grad[k] * (atom_values[k] - value);
      std::fill(grad + atoms, grad + columns, 0.0f);
    }
  }
}

// rows(start, stop) for pieces of them; an exponential takes some ten operations.
template <class Rows>
void in_pieces(std::int64_t count, double numbers_each, const Rows& rows) {
  constexpr std::int64_t PIECE = 32;
  for_each_item((count + PIECE - 1) / PIECE, static_cast<double>(count) * numbers_each,
                [&](std::int64_t item) { rows(item * PIECE, std::min((item + 1) * PIECE, count)); });
}

}  // namespace

void categorical_projection(std::int64_t rows, std::int64_t atoms, const float* probs, const float* positions,
                            float v_max, float* out) {
  const float spacing = 2.0f * v_max / static_cast<float>(atoms - 1);
  const float last = static_cast<float>(atoms - 1);
  std::fill_n(out, rows * atoms, 0.0f);
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* p = probs + row * atoms;
    const float* y = positions + row * atoms;
    float* target = out + row * atoms;
    for (std::int64_t k = 0; k < atoms; ++k) {
      const float index = std::min(std::max((y[k] + v_max) / spacing, 0.0f), last);
      if (std::isnan(y[k])) {
        std::fill_n(target, atoms, y[k]);
        break;
      }
      const auto lower = static_cast<std::int64_t>(index);  // index is not negative
      const float upper_mass = p[k] * (index - static_cast<float>(lower));
      target[lower] += p[k] - upper_mass;
      target[std::min(lower + 1, atoms - 1)] += upper_mass;
    }
  }
}

void categorical_bellman(std::int64_t rows, std::int64_t atoms, Logits logits, Logits next_logits,
                         const float* rewards, const float* discounts, const float* log_probs,
                         float temperature, float v_max, float scale, std::int64_t columns, float* losses,
                         float* grads) {
  const auto each = static_cast<double>((logits.members + next_logits.members) * atoms);
  in_pieces(rows, each, [&](std::int64_t start, std::int64_t stop) {
    bellman_rows(start, stop, rows, atoms, logits, next_logits, rewards, discounts, log_probs, temperature,
                 v_max, scale, columns, losses, grads);
  });
}

void expected_value(std::int64_t rows, std::int64_t atoms, Logits logits, const float* atom_values,
                    float scale, std::int64_t columns, float* values, float* grads) {
  in_pieces(rows, static_cast<double>(logits.members * atoms), [&](std::int64_t start, std::int64_t stop) {
    expected_rows(start, stop, rows, atoms, logits, atom_values, scale, columns, values, grads);
  });
}

}  // namespace brc
