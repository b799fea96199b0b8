// An in-memory store of transitions that keeps every observation once. See ReplayStore for the contract.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "replay_columns.hpp"
#include "row_block.hpp"

namespace brc {

/// Transitions of N streams (environment slots), each of one of T tasks, sampled uniformly.
///
/// Ownership: the store owns all its memory and copies what it is given. It keeps no span after a call.
///
/// Layout: each stream is a ring of rows [observation O, action A, reward, link], one more than its capacity,
/// and all rings lie in one block. The observation of the following row is the successor of a row. Where an
/// episode ended, or where the caller went on from another observation (compared bit by bit), the successor
/// lies in the side store instead, and the link names its slot. So each observation is kept once, and no
/// successor is ever that of another stream or episode.
///
/// Wrap-around: with n streams in a task, a stream keeps its newest ceil(capacity / n) transitions. Each
/// further one replaces the oldest of its stream, whose side slot is freed.
///
/// Threads: every method locks the store while it reads or writes what can change. Calls from several threads
/// are safe and run one after the other, and no method calls back into its caller.
///
/// Failure: a method that throws leaves the store as it was. std::invalid_argument and std::out_of_range name
/// the rule that was broken, OutOfMemory the numbers.
class ReplayStore {
 public:
  /// `task_ids` [N] holds the task of each stream: every task of 0..T-1 at least once. O(N).
  ReplayStore(std::int64_t capacity, std::int64_t observation_size, std::int64_t action_size,
              std::span<const std::int64_t> task_ids, std::uint64_t seed);

  /// Appends one transition to each of the M given streams, which must differ. Refuses other lengths, unknown
  /// or repeated streams, and floats that are not finite. O(N + M (O + A)).
  void add(std::span<const std::int64_t> streams, const TransitionColumns<true>& columns);

  /// Fills `out` with U batches, every stored transition equally likely each time, and advances draws() by U.
  /// Element i of batch u is bounded_draw(seed, draws() + u, i, size()), counted stream after stream and
  /// oldest first. Refuses an empty store and columns that do not all hold U x B rows, B < 2^32. O(N + U B
  /// (log N + O + A)).
  void sample(std::size_t num_batches, std::size_t batch_size, const BatchColumns& out);

  /// Fills `out` (B = 1) with one transition; `age` 0 is the oldest of the stream. O(O + A).
  void read(std::int64_t stream, std::int64_t age, const BatchColumns& out) const;

  /// Writes the content to `out`, which must have n = size() and m = side_size(). O(N O + n (O + A)).
  void save(const StateColumns<false>& out) const;

  /// Replaces content, seed and draw counter by a saved state of any capacity; of each stream the newest rows
  /// that fit are kept. Refuses a state that contradicts itself. O(N O + n (O + A)).
  void load(const StateColumns<true>& state, std::uint64_t seed, std::uint64_t draws);

  /// [N] transitions stored in each stream, and how many fit. O(N).
  [[nodiscard]] std::vector<std::int64_t> sizes() const;
  [[nodiscard]] std::vector<std::int64_t> capacities() const;
  /// Transitions stored (O(N)), and how many of them have their successor aside (O(1)).
  [[nodiscard]] std::size_t size() const {
    return locked([this] { return total(); });
  }
  [[nodiscard]] std::size_t side_size() const {
    return locked([this] { return side_.used(); });
  }
  /// Bytes reserved. Pages that were never written cost no memory.
  [[nodiscard]] std::size_t nbytes() const {
    return locked([this] { return rows_.nbytes() + side_.nbytes(); });
  }
  /// The key of the random numbers, and the number of batches sampled so far.
  [[nodiscard]] std::uint64_t seed() const {
    return locked([this] { return seed_; });
  }
  [[nodiscard]] std::uint64_t draws() const {
    return locked([this] { return draws_; });
  }

 private:
  struct Stream {
    std::int64_t task;
    std::size_t first_row;    // of the ring in rows_; rings follow each other without a gap
    std::uint32_t ring;       // rows of the ring: its capacity + 1
    std::uint32_t next = 0;   // ring position of the next row to write, < ring
    std::uint32_t size = 0;   // rows stored, < ring: those at positions next - size .. next - 1 (mod ring)
    bool head_valid = false;  // row next holds the successor of the newest row, whose link then names no slot
    [[nodiscard]] std::uint32_t position(std::uint32_t age) const noexcept;  // 0 is the oldest
    [[nodiscard]] std::uint32_t after(std::uint32_t pos) const noexcept {
      return pos + 1 == ring ? 0 : pos + 1;
    }
  };
  struct Transition {
    const float* observation;
    const float* action;
    float reward;
    bool terminated;
    bool truncated;
    const float* successor;
  };
  struct Location {
    const float* row;
    const float* following;  // the row that holds the successor unless the link names a slot
    std::int64_t task;
  };

  [[nodiscard]] static std::vector<Stream> make_streams(std::size_t capacity,
                                                        std::span<const std::int64_t> task_ids);
  void append(Stream& stream, const Transition& transition) noexcept;
  void drop_oldest(Stream& stream) noexcept;
  [[nodiscard]] bool departs(const Stream& stream, const float* observation) const noexcept;
  [[nodiscard]] Location at(const Stream& stream, std::uint32_t pos) const noexcept;
  [[nodiscard]] Transition transition(const TransitionColumns<true>& columns, std::size_t i,
                                      const float* successor) const noexcept;
  void prefetch(const Location& location) const noexcept;
  void gather(std::span<const Location> locations, std::size_t first, const BatchColumns& out) const noexcept;
  void require_batch(std::size_t rows, const BatchColumns& out) const;
  template <bool Const>
  void require_state(std::size_t rows, std::size_t side_rows, const StateColumns<Const>& state) const;
  [[nodiscard]] std::size_t total() const noexcept;
  template <class Read>
  [[nodiscard]] std::invoke_result_t<const Read&> locked(const Read& read) const {
    const std::lock_guard lock(mutex_);
    return read();
  }
  [[nodiscard]] float* row(const Stream& stream, std::uint32_t pos) noexcept {
    return rows_.row(stream.first_row + pos);
  }
  [[nodiscard]] const float* row(const Stream& stream, std::uint32_t pos) const noexcept {
    return rows_.row(stream.first_row + pos);
  }
  [[nodiscard]] std::uint32_t link(const float* row) const noexcept;
  void set_link(float* row, std::uint32_t link) const noexcept;

  mutable std::mutex mutex_;     // guards every field below that is not const
  const std::size_t O_;          // observation size, >= 1
  const std::size_t A_;          // action size, >= 1
  std::vector<Stream> streams_;  // N; the number and the rings never change
  RowBlock rows_;                // all rings; rows outside a stream's stored ones are undefined, except heads
  SideStore side_;               // exactly one used slot for each stored row whose link names one
  std::uint64_t seed_;
  std::uint64_t draws_ = 0;  // the number of the next draw
};

}  // namespace brc
