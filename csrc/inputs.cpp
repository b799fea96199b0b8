#include "inputs.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace brc {
namespace {

std::int64_t task_of(const Embedding& embedding, std::int64_t row) {
  const std::int64_t task = embedding.ids[row];
  if (task < 0 || task >= embedding.tasks) {
    throw std::out_of_range("task_ids must be from 0 to " + std::to_string(embedding.tasks - 1) + ", " +
                            std::to_string(task) + " is out of bounds");
  }
  return task;
}

float length_of(const Embedding& embedding, std::int64_t task) {
  const float* e = embedding.data + task * embedding.width;
  float sum = 0.0f;
  for (std::int64_t i = 0; i < embedding.width; ++i) sum += embedding.l1 ? std::fabs(e[i]) : e[i] * e[i];
  return embedding.l1 ? sum : std::sqrt(sum);
}

template <class T>
T* copied(Rows part, std::int64_t row, T* out) {
  const float* from = part.data + row * part.stride;
  for (std::int64_t i = 0; i < part.width; ++i) out[i] = from_float<T>(from[i]);
  return out + part.width;
}

}  // namespace

template <class T>
void pack_inputs(std::int64_t rows, Rows observations, Rows actions, const Embedding& embedding, T* out,
                 std::int64_t width) {
  std::vector<T> normed;
  for (std::int64_t task = 0; embedding.data != nullptr && task < embedding.tasks; ++task) {
    const float length = length_of(embedding, task);
    const float* e = embedding.data + task * embedding.width;
    for (std::int64_t i = 0; i < embedding.width; ++i) normed.push_back(from_float<T>(e[i] / length));
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    T* const start = out + row * width;
    T* to = copied(observations, row, start);
    if (actions.data != nullptr) to = copied(actions, row, to);
    if (embedding.data != nullptr) {
      to = std::copy_n(normed.data() + task_of(embedding, row) * embedding.width, embedding.width, to);
    }
    std::fill(to, start + width, from_float<T>(0.0f));
  }
}

template <class T>
void embedding_gradient(std::int64_t members, std::int64_t rows, const float* grad,
                        std::int64_t member_stride, std::int64_t row_stride, const Embedding& embedding,
                        T* out) {
  const std::int64_t width = embedding.width;
  std::vector<float> sums(static_cast<std::size_t>(embedding.tasks * width));
  for (std::int64_t row = 0; row < rows; ++row) {
    float* sum = sums.data() + task_of(embedding, row) * width;
    for (std::int64_t member = 0; member < members; ++member) {
      const float* given = grad + member * member_stride + row * row_stride;
      for (std::int64_t i = 0; i < width; ++i) sum[i] += given[i];
    }
  }
  for (std::int64_t task = 0; task < embedding.tasks; ++task) {
    const float* e = embedding.data + task * width;
    const float* s = sums.data() + task * width;
    const float length = length_of(embedding, task);
    float along = 0.0f;
    for (std::int64_t i = 0; i < width; ++i) along += e[i] / length * s[i];
    for (std::int64_t i = 0; i < width; ++i) {
      const float sign = e[i] > 0.0f ? 1.0f : (e[i] < 0.0f ? -1.0f : e[i]);  // keeps NaN
      out[task * width + i] = from_float<T>((s[i] - (embedding.l1 ? sign : e[i] / length) * along) / length);
    }
  }
}

template void pack_inputs(std::int64_t, Rows, Rows, const Embedding&, float*, std::int64_t);
template void pack_inputs(std::int64_t, Rows, Rows, const Embedding&, BFloat16*, std::int64_t);
template void embedding_gradient(std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t,
                                 const Embedding&, float*);
template void embedding_gradient(std::int64_t, std::int64_t, const float*, std::int64_t, std::int64_t,
                                 const Embedding&, BFloat16*);

}  // namespace brc
