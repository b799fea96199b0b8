// The arrays that pass between the replay store and its caller.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

namespace brc {

template <bool Const, class T>
using Column = std::span<std::conditional_t<Const, const T, T>>;

/// Columns of M transitions, row-major and owned by the caller. Flags are bytes: 0 is false, the rest is
/// true.
template <bool Const>
struct TransitionColumns {
  Column<Const, float> observations;        // [M, O]
  Column<Const, float> actions;             // [M, A]
  Column<Const, float> rewards;             // [M]
  Column<Const, unsigned char> terminated;  // [M]
  Column<Const, unsigned char> truncated;   // [M]
  Column<Const, float> successors;          // [M, O], in StateColumns [m, O]: where the action led
};

/// What a store holds: its n transitions, stream after stream and oldest first in each. The successor of a
/// row is its row of `successors` where `has_successor` is set (m rows in the same order), else the
/// observation of the stream's next row, else (the newest row) the stream's head.
template <bool Const>
struct StateColumns {
  Column<Const, std::int64_t> sizes;  // [N] transitions of each stream; they sum to n
  TransitionColumns<Const> rows;
  Column<Const, unsigned char> has_successor;  // [n]
  Column<Const, float> heads;                  // [N, O], zero where there is none
  Column<Const, unsigned char> head_valid;     // [N]
};

/// Where B sampled transitions go, row-major and owned by the caller.
struct BatchColumns {
  std::span<float> observations;       // [B, O]
  std::span<float> actions;            // [B, A]
  std::span<float> rewards;            // [B]
  std::span<float> masks;              // [B], 0 where terminated, else 1
  std::span<float> next_observations;  // [B, O]
  std::span<std::int64_t> task_ids;    // [B]
};

}  // namespace brc
