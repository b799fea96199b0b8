// What a row of the replay store holds, and the arrays that pass between the store and its caller.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
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

/// One of the parts that are observed at every step, with `stack` frames when it is sampled.
struct Part {
  Field field;
  std::size_t stack;
  std::size_t offset = 0;  // in an observation, in bytes
};

/// A row is [observation, fields (the action first), reward float32, link], each aligned to its elements, and
/// padded to 64 bytes. An observation is its parts side by side, of each the newest frame; the gaps between
/// them are zero.
struct Layout {
  static constexpr std::size_t kMaxFields = 16;                   // and parts of an observation
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 30;  // of a field

  Layout(std::vector<Part> parts_, std::vector<Field> fields_)
      : parts(std::move(parts_)), fields(std::move(fields_)) {
    if (parts.empty() || parts.size() > kMaxFields) {
      refuse("an observation has 1 to " + to_string(kMaxFields) + " parts, got " + to_string(parts.size()));
    }
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
    std::size_t end = 0;
    for (Part& part : parts) {
      require(part.field);
      part.offset = align(end, part.field.item);
      end = part.offset + part.field.bytes;
      stack = std::max(stack, part.stack);
    }
    observation = parts.size() == 1 ? parts[0].field : Field{"observations", end, 1, Kind::integer};
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
  Layout(Field observation_, std::vector<Field> fields_, std::size_t stack_)
      : Layout(std::vector{Part{std::move(observation_), stack_}}, std::move(fields_)) {}
  [[nodiscard]] static constexpr std::size_t align(std::size_t offset, std::size_t to) noexcept {
    return (offset + to - 1) / to * to;
  }

  std::vector<Part> parts;           // of an observation
  std::vector<Field> fields;         // of every transition, the action first
  Field observation;                 // all parts of one; what is finite in several is asked part by part
  std::size_t stack = 0;             // frames of the part with the most
  std::vector<std::size_t> offsets;  // of the fields in a row, in bytes
  std::size_t reward, link, used, stride;
};

template <class Column>
using Columns = std::array<Column, Layout::kMaxFields>;  // as many as the layout has parts, or fields

/// Columns of M transitions, row-major and owned by the caller. Flags are bytes: 0 is false, the rest is
/// true.
struct TransitionColumns {
  Columns<Bytes> observations;                // [M, one frame] of each part
  Columns<Bytes> fields;                      // [M, field] each
  std::span<const float> rewards;             // [M]
  std::span<const unsigned char> terminated;  // [M]
  std::span<const unsigned char> truncated;   // [M]
  Columns<Bytes> successors;                  // [M, one frame] of each part: where the action led
  std::span<const unsigned char> starts;      // [M] or empty: an episode begins with it
};

/// Where B sampled transitions go, row-major and owned by the caller.
struct BatchColumns {
  Columns<MutableBytes> observations;       // [B, stack, one frame] of each part, the oldest frame first
  Columns<MutableBytes> fields;             // [B, field] each
  std::span<float> rewards;                 // [B], discounted sums for several steps
  std::span<float> masks;                   // [B], 0 where terminated, else discount^(steps - 1)
  Columns<MutableBytes> next_observations;  // [B, stack, one frame] of each part
  std::span<std::int64_t> task_ids;         // [B]
  std::span<unsigned char> terminated;      // [B], 0 or 1: the last of its steps
  std::span<unsigned char> truncated;       // [B]
  std::span<std::int64_t> steps;            // [B]
  std::span<std::int64_t> indices;          // [B] see ReplayIndex::index_of
  std::span<float> weights;                 // [B] importance, for draws by priority, else none
};

inline void require_length(const std::string& name, std::size_t got, std::size_t wanted, const char* unit) {
  if (got != wanted)
    refuse(name + " must hold " + to_string(wanted) + " " + unit + ", got " + to_string(got));
}

/// Refuses columns that do not hold `rows` transitions of `layout`, with `frames` of a part.
template <class Columns, class Frames>
void require_payload(const Columns& columns, const Layout& layout, std::size_t rows, const Frames& frames,
                     const char* following) {
  for (std::size_t p = 0; p < layout.parts.size(); ++p) {
    const Field& field = layout.parts[p].field;
    const std::size_t bytes = rows * frames(layout.parts[p]) * field.bytes;
    require_length(field.name, columns.observations[p].size(), bytes, "bytes");
    const bool led = [&] {
      if constexpr (requires { columns.successors; })
        return columns.successors[p].size() == bytes;
      else
        return columns.next_observations[p].size() == bytes;
    }();
    if (!led) refuse(std::string(following) + " must hold " + to_string(bytes) + " bytes as " + field.name);
  }
  for (std::size_t f = 0; f < layout.fields.size(); ++f) {
    const Field& field = layout.fields[f];
    require_length(field.name, columns.fields[f].size(), rows * field.bytes, "bytes");
  }
  require_length("rewards", columns.rewards.size(), rows, "values");
  require_length("terminated", columns.terminated.size(), rows, "values");
  require_length("truncated", columns.truncated.size(), rows, "values");
}

inline void require_columns(const TransitionColumns& columns, const Layout& layout, std::size_t rows) {
  require_payload(columns, layout, rows, [](const Part&) { return std::size_t{1}; }, "successors");
}

inline void require_columns(const BatchColumns& columns, const Layout& layout, std::size_t rows) {
  require_payload(columns, layout, rows, [](const Part& part) { return part.stack; }, "next_observations");
  require_length("masks", columns.masks.size(), rows, "values");
  require_length("task_ids", columns.task_ids.size(), rows, "values");
  require_length("steps", columns.steps.size(), rows, "values");
  require_length("indices", columns.indices.size(), rows, "values");
}

}  // namespace brc
