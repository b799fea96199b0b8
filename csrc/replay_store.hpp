// An in-memory store of transitions that keeps every observation once. See ReplayStore for the contract.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "fair_lock.hpp"
#include "replay_index.hpp"
#include "replay_layout.hpp"
#include "replay_segment.hpp"
#include "row_block.hpp"

namespace brc {

/// Batches gathered before they are asked for; see ReplayStore::gather_ahead.
struct Ahead {
  std::vector<Pick> picks;       // [U * B], empty: nothing was gathered
  std::uint64_t life = 0;        // of the store's content
  std::uint64_t priorities = 0;  // the version of them that it was drawn by
};

/// A save under way: how far it is, and the rows that were replaced before it came to them.
class Saved;

/// Transitions of N streams (environment slots), each of one of T tasks, sampled at random.
///
/// Ownership: the store owns all its memory and copies what it is given. It keeps no span after a call.
///
/// Layout: each stream is a ring of rows (see Layout), `stack` more than its capacity, and all rings lie in
/// one block. The observation of the following row is the successor of a row; that of the newest row lies in
/// the stream's head until then. Where an episode ended, or where the caller went on from another observation
/// (compared bit by bit), the successor lies in the side store instead, and the link names its slot. So each
/// observation is kept once, and no successor is ever that of another stream or episode. Stacked observations
/// are put together when they are sampled.
///
/// Insertion: the heads of all streams lie together, so that it reads nothing but what it read the last time,
/// and writes whole rows. It reads every argument once and writes what it finds at the same time: to the rows
/// after the newest ones, where nobody looks yet, and over the heads, which can be restored, since those that
/// nobody departed from equal the observations. All of it counts only once it was found right.
///
/// Wrap-around: with n streams in a task, a stream keeps its newest ceil(capacity / n) transitions. Each
/// further one replaces the oldest of its stream, whose side slot is freed.
///
/// Threads: every method locks. Those that only read the content (sample, gather_ahead, settle, write_segment
/// and the rest that is const) run side by side; the others run alone. Nobody waits long for a turn:
/// samples and saves take theirs in slices of about a megabyte, and what an add replaces before a save has
/// come to it is kept for that. So a save holds what was stored when it began, while each transition of a
/// sample is one of those stored when it is drawn. Loads, adoptions and saves wait for each other. No method
/// calls back into its caller.
///
/// Failure: a method that throws leaves the store as it was, except for load and extend, which say so; a
/// sample may have filled part of `out`. std::invalid_argument and std::out_of_range name the rule that was
/// broken, OutOfMemory the numbers.
class ReplayStore {
 public:
  /// Arguments as in ReplayIndex; `allow_not_finite` keeps NaN and infinity instead of refusing them. O(N),
  /// or O(rows) with priorities.
  ReplayStore(Layout layout, std::span<const std::int64_t> capacities, std::span<const std::int64_t> task_ids,
              std::uint64_t seed, bool allow_not_finite, std::optional<double> alpha = std::nullopt);

  /// Appends one transition to each of the M given streams, which must differ, or to all N in order. Refuses
  /// other lengths, unknown or repeated streams, and floats that are not finite. O(M bytes of a transition).
  void add(std::span<const std::int64_t> streams, const TransitionColumns& columns);
  void add(const TransitionColumns& columns) { add(all_streams_, columns); }
  /// As add, but waits for no other writer, only for readers, which take a slice of a megabyte or so at once:
  /// false, and nothing is stored, where there is one.
  bool add_if_first(std::span<const std::int64_t> streams, const TransitionColumns& columns);

  /// Appends many transitions to a stream, one after the other, and returns their number. What is not finite
  /// is refused before anything is stored. Others may come in between after every slice of a megabyte or so;
  /// one that runs out of memory leaves those before stored. An episode begins where an observation is not
  /// the last successor, and where `starts` says so.
  ///
  /// Without successors, an action led to the next observation, or nowhere where it terminated: its own
  /// observation stands in. Where the next one is of another episode or not there, the transition is left
  /// out. O(bytes).
  std::size_t extend(std::int64_t stream, const TransitionColumns& columns);
  /// Forgets everything, but not how many batches were sampled.
  void clear();
  void clear(std::span<const std::int64_t> streams);
  /// Takes the newest episode of a stream back, over or not; returns how many transitions that were.
  std::size_t discard_episode(std::int64_t stream);
  /// The next observation of these streams begins an episode, whatever it is. O(M).
  void reset(std::span<const std::int64_t> streams);

  /// Fills `out` with U batches and advances draws() by U. Refuses columns that do not all hold U x B rows
  /// and a request that cannot be served. O(U B (log N + bytes)), and O(N) with tasks or weights.
  void sample(const Request& request, std::size_t num_batches, std::size_t batch_size,
              const BatchColumns& out) {
    Ahead nothing;
    (void)settle(request, num_batches, batch_size, out, nothing);
  }
  /// Fills `out` with the U batches from number `draw` on, as far as that can be known now.
  void gather_ahead(const Request& request, std::uint64_t draw, std::size_t num_batches,
                    std::size_t batch_size, const BatchColumns& out, Ahead& ahead) const;
  /// What sample would do, where `out` was filled by gather_ahead: gathers anew only those elements that are
  /// other ones now, and returns their number.
  std::size_t settle(const Request& request, std::size_t num_batches, std::size_t batch_size,
                     const BatchColumns& out, Ahead& ahead);

  /// Fills `out` with the transitions of these names; throws std::out_of_range where one is not stored.
  /// O(bytes).
  void read(std::span<const std::int64_t> indices, const Request& request, const BatchColumns& out) const;
  /// The names of all transitions, stream after stream and oldest first.
  [[nodiscard]] std::vector<std::int64_t> indices() const;
  /// Whether episodes begin with the transitions of these names: see ReplayIndex::begins.
  [[nodiscard]] std::vector<unsigned char> begins(std::span<const std::int64_t> indices) const;
  /// B sequences of `length` transitions each; advances draws() by one.
  [[nodiscard]] Sequences sequences(std::size_t batch_size, std::size_t length);

  /// Around a fork: no other thread works on the store meanwhile. A child has the content, and random numbers
  /// of its own, which its number decides.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }
  void after_fork_in_child(std::uint64_t number) noexcept;

  /// As ReplayIndex::set_priorities.
  std::size_t set_priorities(std::span<const std::int64_t> indices, std::span<const float> priorities) {
    const std::unique_lock lock(mutex_);
    return index_.set_priorities(indices, priorities);
  }

  /// Writes to a file all rows kept whose sequence number is at least `from` [N] of their stream, and says
  /// what it wrote. Throws std::system_error. O(bytes), with a few megabytes of memory and what is replaced
  /// meanwhile.
  [[nodiscard]] Snapshot write_segment(int file, std::span<const std::uint64_t> from) const;
  /// Replaces the content by that of segments, oldest first, which together hold what `content` says. Reads
  /// every file twice: before anything changes, all of it is checked. A read error after that leaves the
  /// store empty. O(bytes).
  void load(const Content& content, std::span<const SegmentFile> segments, std::uint64_t seed);

  /// Takes over another index. Its rows, with the heads in the rows after the newest, must have been written
  /// with `row`; its slots may be written with `slot` before or after.
  void adopt(const ReplayIndex& index, std::uint64_t draws);
  /// The index as it is now, without links.
  [[nodiscard]] ReplayIndex index() const;
  /// Copies the heads to the rows after the newest, for one who reads all rows with `row`. O(N).
  void write_heads();
  /// Raw memory of a row and of a side slot (grown as needed). Not locked.
  [[nodiscard]] std::byte* row(std::size_t row) noexcept { return rows_.row(row); }
  [[nodiscard]] std::byte* slot(std::size_t slot);
  [[nodiscard]] std::uint32_t link(std::size_t row) const noexcept { return index_.link(row); }

  [[nodiscard]] const Layout& layout() const noexcept { return layout_; }
  /// 0..N-1.
  [[nodiscard]] std::span<const std::int64_t> all_streams() const noexcept { return all_streams_; }
  [[nodiscard]] std::size_t num_streams() const noexcept { return all_streams_.size(); }
  /// [N] transitions stored in each stream, and how many fit. O(N).
  [[nodiscard]] std::vector<std::int64_t> sizes() const;
  [[nodiscard]] std::vector<std::int64_t> capacities() const;
  /// Transitions stored, and how many rows have their successor aside. O(1).
  [[nodiscard]] std::size_t size() const {
    return reading([this] { return index_.size(); });
  }
  [[nodiscard]] std::size_t side_size() const {
    return reading([this] { return index_.used_slots(); });
  }
  /// Of the transitions that came since the content was replaced, those that jumped; see ReplayIndex. O(1).
  [[nodiscard]] Jumps jumps() const {
    return reading([this] { return index_.jumps(); });
  }
  /// Side slots that the index may name.
  [[nodiscard]] std::size_t slots() const {
    return reading([this] { return index_.slots(); });
  }
  /// Bytes reserved. Pages that were never written cost no memory.
  [[nodiscard]] std::size_t nbytes() const {
    return reading([this] {
      const Priorities* priorities = index_.priorities();
      return rows_.nbytes() + heads_.nbytes() + departed_.nbytes() + side_.nbytes() +
             (priorities == nullptr ? 0 : priorities->nbytes());
    });
  }
  [[nodiscard]] std::uint64_t seed() const {
    return reading([this] { return index_.seed; });
  }
  /// Batches sampled so far.
  [[nodiscard]] std::uint64_t draws() const noexcept { return draws_; }
  void set_draws(std::uint64_t draws) noexcept { draws_ = draws; }

 private:
  /// add, in a turn of its own.
  void append(std::span<const std::int64_t> streams, const TransitionColumns& columns);
  /// Puts the parts of observations side by side in `memory`, where there are several.
  [[nodiscard]] Bytes joined(const Columns<Bytes>& parts, std::size_t first, std::size_t count,
                             std::vector<std::byte>& memory) const;
  /// A turn in which alone this thread works on the content, and no save is under way.
  [[nodiscard]] std::pair<std::unique_lock<std::mutex>, std::unique_lock<FairLock>> alone() const;
  void require_finite(std::span<const std::int64_t> streams, const TransitionColumns& columns) const;
  void require_finite(const char* name, const Field& field, Bytes values, std::int64_t stream) const;
  /// Calls `use(first, picks)` for the elements of U batches from number `draw()` on, in slices and locked,
  /// and writes importance weights.
  template <class Draw, class Use>
  void pick_in_slices(const Request& request, std::size_t num_batches, std::size_t batch_size,
                      const BatchColumns& out, const Draw& draw, const Use& use) const;
  void gather(std::span<Pick> picks, const Request& request, std::size_t first,
              const BatchColumns& out) const noexcept;
  void gather_plain(std::span<Pick> picks, std::size_t first, const BatchColumns& out) const noexcept;
  void copy_plain(std::span<const std::uint32_t> rows, std::span<const Pick> picks, std::size_t first,
                  const BatchColumns& out) const noexcept;
  void gather_fields(const std::byte* row, std::size_t i, const BatchColumns& out) const noexcept;
  void gather_one(Pick& pick, const Request& request, std::size_t i, const BatchColumns& out) const noexcept;
  void gather_observations(const Pick& pick, const Window& window, std::size_t i,
                           const BatchColumns& out) const noexcept;
  void prefetch(const Pick& pick, std::size_t n_step) const noexcept;
  /// The successor at the end of a window of stream `s`.
  [[nodiscard]] const std::byte* successor(std::size_t s, const Window& window) const noexcept {
    if (window.successor < 0) return side_.at(static_cast<std::size_t>(-1 - window.successor));
    const auto row = static_cast<std::size_t>(window.successor);
    return row == index_.head_row(s) ? heads_.row(s) : rows_.row(row);
  }
  /// Writes what add was given, but for links, to where it will be, and says whether all of it is finite.
  [[nodiscard]] bool stage(std::span<const std::int64_t> streams, const TransitionColumns& columns,
                           Bytes seen, Bytes led) noexcept;
  /// Marks, of the rows of an extend, those that jump from the row before, and says whether all are finite.
  [[nodiscard]] bool look_at(const TransitionColumns& columns, std::span<unsigned char> jumps) const noexcept;
  /// Brings the heads back that `stage` has overwritten.
  void unstage(std::span<const std::int64_t> streams, Bytes seen) noexcept;
  void keep_aside(std::int64_t slot, const std::byte* observation) noexcept {
    std::memcpy(side_.at(static_cast<std::size_t>(slot)), observation, layout_.observation.bytes);
  }
  /// Makes room in the save under way for what `each` further transitions of these streams replace.
  void reserve_saved(std::span<const std::int64_t> streams, std::size_t each = 1);
  /// Keeps the row that the next transition of a stream replaces for the save under way, if that still needs
  /// it. `head` is the successor of the newest row.
  void keep_for_save(std::size_t s, const std::byte* head) noexcept;
  /// Writes the image of a row in a file, `newest` at the moment of the save and with its successor in the
  /// head.
  void put_image(std::size_t row, bool newest, std::byte* image) const noexcept;
  /// Lets a staged transition count, the i-th of an add.
  void commit(std::size_t s, std::size_t i) noexcept;
  void check_content(const Content& content) const;
  void require_bytes(const SegmentFile& segment) const;
  /// Also returns the segment's priorities.
  std::vector<float> check_segment(const Content& content, const SegmentFile& segment) const;
  void check_priorities(const Content& content, const SegmentFile& segment,
                        std::span<const float> priorities) const;
  void apply_segment(const Content& content, const SegmentFile& segment);
  void reserve_slots(std::size_t more);
  template <class Read>
  [[nodiscard]] std::invoke_result_t<const Read&> reading(const Read& read) const {
    const std::shared_lock lock(mutex_);
    return read();
  }

  mutable std::mutex saving_;      // held by saves, loads and adoptions, and locked before mutex_
  mutable FairLock mutex_;         // guards all that follows
  mutable Saved* save_ = nullptr;  // the save that is under way
  const Layout layout_;
  const bool allow_not_finite_;
  ReplayIndex index_;
  RowBlock rows_;           // of all rings; those that the index does not keep are undefined
  RowBlock heads_;          // [N] the newest successors of streams whose head is valid
  SideStore side_;          // by slot
  std::uint64_t life_ = 0;  // times that the content was replaced
  std::atomic<std::uint64_t> draws_ = 0;
  std::vector<std::int64_t> all_streams_;  // 0..N-1
  std::vector<std::int64_t> given_;        // scratch of add: the streams it was given
  std::vector<unsigned char> departs_;     // [N] scratch of add: whether a transition departs from the head
  std::vector<std::uint32_t> ends_;        // [N] scratch of add: the flags of its link
  std::vector<std::byte> seen_, led_;      // scratch of add: observations and successors of several parts
  RowBlock departed_;                      // [N] scratch of add: the heads that those depart from
  RowBlock tails_;                         // scratch of add: the lines of rows that observations do not fill
};

}  // namespace brc
