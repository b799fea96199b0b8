// What a row of the replay store holds, and the arrays that pass between the store and its caller.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace brc {

using Bytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;
using std::to_string;

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

/// What the store must know of a dtype: only floats can be something else than finite.
enum class Kind : unsigned char { integer, float16, bfloat16, float32 };

/// One value per transition: `bytes` in all, of elements of `item` bytes.
struct Field {
  std::string name;
  std::size_t bytes;
  std::size_t item;
  Kind kind;
};

/// A row is [observation, fields (the action first), reward float32, link], each aligned to its elements, and
/// padded to 64 bytes. With `stack` frames per observation, a row keeps only the newest frame.
struct Layout {
  static constexpr std::size_t kMaxFields = 16;
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 30;  // of a field

  Layout(Field observation_, std::vector<Field> fields_, std::size_t stack_)
      : observation(std::move(observation_)), fields(std::move(fields_)), stack(stack_) {
    if (fields.empty() || fields.size() > kMaxFields) {
      refuse("a row holds 1 to " + to_string(kMaxFields) + " fields beside the observation, got " +
             to_string(fields.size()));
    }
    const auto require = [](const Field& field) {
      if (field.bytes < 1 || field.bytes > kMaxBytes) {
        refuse(field.name + " must have 1 to " + to_string(kMaxBytes) + " bytes, got " +
               to_string(field.bytes));
      }
      if (field.item < 1 || field.item > 8 || field.bytes % field.item != 0) {
        refuse(field.name + " must be of whole elements of 1 to 8 bytes, got elements of " +
               to_string(field.item));
      }
    };
    require(observation);
    std::size_t end = observation.bytes;
    for (const Field& field : fields) {
      require(field);
      offsets.push_back(align(end, field.item));
      end = offsets.back() + field.bytes;
    }
    reward = align(end, sizeof(float));
    link = reward + sizeof(float);
    used = link + sizeof(std::uint32_t);
    stride = align(used, 64);
  }
  [[nodiscard]] static constexpr std::size_t align(std::size_t offset, std::size_t to) noexcept {
    return (offset + to - 1) / to * to;
  }

  Field observation;                 // one frame of it
  std::vector<Field> fields;         // of every transition, the action first
  std::size_t stack;                 // frames per observation, >= 1
  std::vector<std::size_t> offsets;  // of the fields in a row, in bytes
  std::size_t reward, link, used, stride;
};

/// Columns of M transitions, row-major and owned by the caller. Flags are bytes: 0 is false, the rest is
/// true.
struct TransitionColumns {
  Bytes observations;                            // [M, one frame]
  std::array<Bytes, Layout::kMaxFields> fields;  // [M, field] each, as many as the layout has
  std::span<const float> rewards;                // [M]
  std::span<const unsigned char> terminated;     // [M]
  std::span<const unsigned char> truncated;      // [M]
  Bytes successors;                              // [M, one frame]: where the action led
};

/// Where B sampled transitions go, row-major and owned by the caller.
struct BatchColumns {
  MutableBytes observations;                            // [B, stack, one frame], the oldest frame first
  std::array<MutableBytes, Layout::kMaxFields> fields;  // [B, field] each
  std::span<float> rewards;                             // [B], discounted sums for several steps
  std::span<float> masks;                               // [B], 0 where terminated, else discount^(steps - 1)
  MutableBytes next_observations;                       // [B, stack, one frame]
  std::span<std::int64_t> task_ids;                     // [B]
};

inline void require_length(const std::string& name, std::size_t got, std::size_t wanted, const char* unit) {
  if (got != wanted)
    refuse(name + " must hold " + to_string(wanted) + " " + unit + ", got " + to_string(got));
}

/// Refuses columns that do not hold `rows` transitions of `layout`.
template <class Columns>
void require_payload(const Columns& columns, const Layout& layout, std::size_t rows) {
  for (std::size_t f = 0; f < layout.fields.size(); ++f) {
    const Field& field = layout.fields[f];
    require_length(field.name, columns.fields[f].size(), rows * field.bytes, "bytes");
  }
  require_length("rewards", columns.rewards.size(), rows, "values");
}

inline void require_columns(const TransitionColumns& columns, const Layout& layout, std::size_t rows) {
  require_length("observations", columns.observations.size(), rows * layout.observation.bytes, "bytes");
  require_payload(columns, layout, rows);
  require_length("terminated", columns.terminated.size(), rows, "values");
  require_length("truncated", columns.truncated.size(), rows, "values");
  require_length("successors", columns.successors.size(), rows * layout.observation.bytes, "bytes");
}

inline void require_columns(const BatchColumns& columns, const Layout& layout, std::size_t rows) {
  const std::size_t observation = layout.stack * layout.observation.bytes;
  require_length("observations", columns.observations.size(), rows * observation, "bytes");
  require_payload(columns, layout, rows);
  require_length("masks", columns.masks.size(), rows, "values");
  require_length("next_observations", columns.next_observations.size(), rows * observation, "bytes");
  require_length("task_ids", columns.task_ids.size(), rows, "values");
}

}  // namespace brc
