// Which transition lies where: the rings, their ends and the draws of a replay store, without its data.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "philox.hpp"
#include "priorities.hpp"
#include "replay_layout.hpp"

namespace brc {

// A row's link: two flags, and the side slot of the successor plus one (zero: no slot).
constexpr std::uint32_t kTerminated = 1u << 31;
constexpr std::uint32_t kTruncated = 1u << 30;
constexpr std::uint32_t kSlot = kTruncated - 1;

constexpr std::size_t kMaxStack = 1024;  // frames of an observation, and steps summed

/// The links of all rows, `stride` bytes apart in memory that somebody else owns.
class Links {
 public:
  Links() = default;
  Links(std::byte* first, std::size_t stride) noexcept : first_(first), stride_(stride) {}
  [[nodiscard]] std::uint32_t get(std::size_t row) const noexcept {
    std::uint32_t word;
    std::memcpy(&word, first_ + row * stride_, sizeof(word));
    return word;
  }
  void set(std::size_t row, std::uint32_t word) noexcept {
    std::memcpy(first_ + row * stride_, &word, sizeof(word));
  }

 private:
  std::byte* first_ = nullptr;
  std::size_t stride_ = 0;
};

/// A sampled transition: which one, and over how many steps. What it holds never changes.
struct Pick {
  std::uint32_t stream;
  std::uint32_t steps;  // 0: not yet known
  std::uint64_t sequence;
  std::size_t row;  // where it was when it was picked
};

/// The ring of one environment slot.
struct Stream {
  std::int64_t task;
  std::size_t first_row;    // of the ring; rings follow each other without a gap
  std::uint32_t capacity;   // transitions that can be sampled
  std::uint32_t ring;       // rows: capacity + stack, for the head and the frames before the oldest
  std::uint32_t next = 0;   // ring position of the next row to write
  std::uint32_t size = 0;   // transitions that can be sampled, the newest ones of those kept
  std::uint32_t kept = 0;   // rows kept, < ring: size, and up to stack - 1 older ones for their frames
  std::uint32_t phase = 0;  // cell of the next transition, < capacity; equals size until that is capacity
  std::uint64_t count = 0;  // transitions ever added: the sequence number of the next one
  bool head_valid = false;  // the head holds the successor of the newest row, whose link then names no slot

  /// Ring position of the transition `back` before the newest.
  [[nodiscard]] std::uint32_t position(std::uint32_t back) const noexcept { return before(next, back, ring); }
  [[nodiscard]] std::uint32_t after(std::uint32_t pos) const noexcept {
    return pos + 1 == ring ? 0 : pos + 1;
  }
  /// The distance from the newest of the transition in a cell, in which it stays until it is replaced; and
  /// the cell of the transition at a distance.
  [[nodiscard]] std::uint32_t back_of(std::uint32_t cell) const noexcept {
    return before(phase, cell, capacity);
  }
  /// Cells among which one is drawn: the size rounded up to a power of two, or the capacity.
  [[nodiscard]] std::uint32_t reach() const noexcept {
    return size == 0 ? 0 : std::min(std::bit_ceil(size), capacity);
  }
  [[nodiscard]] std::uint32_t back(std::uint64_t sequence) const noexcept {
    return static_cast<std::uint32_t>(count - 1 - sequence);
  }
  /// The transition `back` before the newest of this stream, which is number `s`.
  [[nodiscard]] Pick pick(std::uint32_t s, std::uint32_t back) const noexcept {
    return {s, 0, count - 1 - back, first_row + position(back)};
  }

 private:
  /// `end` - 1 - `steps` modulo `length`, where both are below it. Without a branch: nobody can tell which
  /// side of a ring's end a random transition lies on.
  [[nodiscard]] static std::uint32_t before(std::uint32_t end, std::uint32_t steps,
                                            std::uint32_t length) noexcept {
    return end - 1 - steps + (length & (0u - static_cast<std::uint32_t>(steps >= end)));
  }
};

/// What to sample. Several steps are summed to one transition, which stops at the end of an episode, at a
/// jump and at the newest transition.
struct Request {
  /// `n_step` >= 1; powers of `discount` in [0, 1]; `beta` in [0, 1] alone, without tasks and weights.
  Request(std::int64_t n_step, double discount, std::vector<std::int64_t> tasks, std::vector<double> weights,
          std::optional<double> beta = std::nullopt);
  std::vector<float> powers;        // [n_step] discount^i
  std::vector<std::int64_t> tasks;  // sampled from; empty: all
  std::vector<double> weights;      // [tasks] shares of a batch; empty: every transition equally likely
  std::optional<double> beta;       // of importance weights: draws by priority
};

/// Cells of streams, one after the other.
struct Group {
  void add(std::size_t stream, std::uint32_t cells) {
    equal = ends.empty() || equal == cells ? cells : 0;
    ends.push_back((ends.empty() ? 0 : ends.back()) + cells);
    streams.push_back(static_cast<std::uint32_t>(stream));
  }
  /// The stream that has cell `k` of all, and which of its own that is.
  [[nodiscard]] std::pair<std::uint32_t, std::uint32_t> at(std::uint32_t k) const noexcept {
    if (equal != 0) return {streams[k / equal], k % equal};
    const auto member = static_cast<std::size_t>(std::ranges::upper_bound(ends, k) - ends.begin());
    return {streams[member], member == 0 ? k : k - ends[member - 1]};
  }
  std::vector<std::uint32_t> streams;
  std::vector<std::uint32_t> ends;  // cells of the streams up to and with each
  std::uint32_t equal = 0;          // the cells of each, where they are as many
};

/// How the elements of a batch spread over groups: by `shares`, in order, each rounded by less than one.
struct Strata {
  std::vector<Group> groups;   // one per task with weights, else one: of the cells in reach
  std::vector<double> shares;  // cumulative; the last is the sum
};

/// Where an appended transition goes. A place is a row, or -1 - slot in the side store.
struct Placement {
  std::size_t row;
  std::uint32_t link;      // of the row
  std::int64_t moved;      // side slot for what the head holds now, or -1
  std::int64_t successor;  // place of the successor: the head, which is the row after this one, or a slot
};

/// Where the parts of a sampled transition are.
struct Window {
  std::size_t row;         // of the first step
  std::uint32_t position;  // of the first step in the ring
  std::uint32_t steps;
  std::uint32_t last;      // ring position of the last step
  std::int64_t successor;  // place of the last step's successor
  bool terminated;         // at the last step
  bool truncated;
};

/// Transitions that followed each other, row by row.
struct Sequences {
  std::vector<std::int64_t> indices;  // [B, length] their names
  std::vector<unsigned char> starts;  // [B, length] whether an episode begins with it
};

/// How often an observation was not the successor of a transition that no end followed.
struct Jumps {
  std::uint64_t count = 0;
  std::uint64_t of = 0;  // appended transitions
};

/// The index of N streams of T tasks.
///
/// It holds no lock and no data: its owner locks, and moves observations where it says. Links are read and
/// written through `Links`, whose memory the owner provides (one link per row, all zero at first or not).
///
/// Draws: element i of batch number d is the first acceptable one of attempts 0, 1, ...; attempt a reads word
/// i mod 4 of the Philox block (d low, d high, i / 4, a), takes from it an unbiased integer below the cells
/// in reach of the streams and accepts it if that cell holds a transition. At least half of the cells do.
/// Cells keep their place while streams grow, so that a batch drawn ahead stays right but for what was added
/// meanwhile.
class ReplayIndex {
 public:
  /// `capacities` [T] transitions per task; a task with n streams keeps ceil(capacity / n) of each.
  /// `task_ids` [N]: the task of each stream, every task of 0..T-1 at least once. With `alpha`, transitions
  /// have priorities. Throws std::invalid_argument. O(N), or O(rows) with priorities.
  ReplayIndex(std::span<const std::int64_t> capacities, std::span<const std::int64_t> task_ids,
              std::int64_t stack, std::uint64_t seed, std::optional<double> alpha = std::nullopt);

  /// Must be called after construction and after a copy, before anything else.
  void bind(Links links);
  [[nodiscard]] const std::vector<Stream>& streams() const noexcept { return streams_; }
  [[nodiscard]] std::size_t tasks() const noexcept { return sizes_.size(); }
  [[nodiscard]] std::size_t rows() const noexcept { return streams_.back().first_row + streams_.back().ring; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::uint32_t link(std::size_t row) const noexcept { return links_.get(row); }

  /// Refuses streams that are unknown or named twice. O(M).
  void require_streams(std::span<const std::int64_t> ids);
  /// The row where the next transition of a stream goes, the head: what leads there is the last successor if
  /// `streams()[s].head_valid`.
  [[nodiscard]] std::size_t head_row(std::size_t s) const noexcept {
    return streams_[s].first_row + streams_[s].next;
  }
  /// Makes `more` side slots free. Throws std::bad_alloc, with everything as it was.
  void reserve_slots(std::size_t more);
  /// Appends a transition; `departs`: its observation differs from a valid head, which must be moved away.
  /// The link is the caller's to write, with the rest of the row or by `set_link`, before anything else.
  /// Precondition: as many slots are reserved as this needs (one for a departure, one for an end). O(1).
  Placement append(std::size_t s, bool departs, bool terminated, bool truncated) noexcept;
  void set_link(std::size_t row, std::uint32_t word) noexcept { links_.set(row, word); }
  /// Takes the newest transitions of a stream off until `count` were ever added. Precondition: they are kept.
  void rewind(std::size_t s, std::uint64_t count) noexcept;
  /// Takes the newest episode of a stream off, over or not, and returns how many transitions that were.
  std::size_t discard_episode(std::size_t s) noexcept;
  /// Lets the head go: its observation is to be moved to the side slot that is returned, or -1 where there is
  /// none. Precondition: a slot is reserved.
  std::int64_t leave(std::size_t s) noexcept;
  /// Empties every stream, or one; refresh() must follow the latter.
  void clear() noexcept;
  void clear(std::size_t s) noexcept;
  /// Since clear() or count_jumps_anew(), without those after leave().
  [[nodiscard]] Jumps jumps() const noexcept { return jumps_; }
  void count_jumps_anew() noexcept { jumps_ = {}; }
  /// Must follow appends, rewinds and adoptions before the next draw. O(1), or O(N) where a reach changed;
  /// with priorities, O(log cells) for each.
  void refresh() noexcept;
  /// Sets what a stream that was filled by `append` cannot know: numbers of another life. Precondition: size
  /// <= kept, phase < capacity, and phase equals size below the capacity.
  void adopt(std::size_t s, std::uint64_t count, std::uint32_t size, std::uint32_t phase) noexcept;

  /// Null without alpha.
  [[nodiscard]] const Priorities* priorities() const noexcept {
    return priorities_ ? &*priorities_ : nullptr;
  }
  /// Sets the priorities [M] of the transitions with these indices [M], but for those that are not stored any
  /// more, and returns the number of the others. Refuses other lengths, an index that no transition ever had
  /// (std::out_of_range) and what Priorities refuses, all before it sets one. Of several for the same
  /// transition the last holds. O(M log cells).
  std::size_t set_priorities(std::span<const std::int64_t> indices, std::span<const float> priorities);
  /// Starts the priorities anew: the first is the largest so far, then follow those of the newest `sizes` [N]
  /// transitions of each stream, oldest first, at least as many as it has. Where there are none, all are 1.
  /// Must follow adopt. Precondition: there are priorities, which were required. O(cells).
  void restore_priorities(std::span<const std::uint32_t> sizes, std::span<const float> priorities) noexcept;

  /// Refuses a request that this index cannot serve now. O(1), or O(N) with tasks.
  void require_request(const Request& request, std::size_t batch_size) const;
  /// The streams a request draws from. O(1) or O(N). Precondition: require_request passed.
  [[nodiscard]] const Strata& strata(const Request& request, Strata& scratch) const;
  /// Elements of batch number `draw`, of `count` elements, from element `first` on; their steps are 0.
  /// `strata` are those of the request. O(log) each.
  void draw(const Request& request, const Strata& strata, std::uint64_t draw, std::size_t count,
            std::size_t first, std::span<Pick> picks) const noexcept;
  /// The probabilities [M] with which transitions [M] are drawn by priority. Precondition: they are stored.
  void shares(std::span<const Pick> picks, std::span<double> out) const noexcept;
  /// Where a picked transition is; `n_step` bounds its steps. O(n_step).
  [[nodiscard]] Window window(const Pick& pick, std::size_t n_step) const noexcept;
  /// The name of a transition as long as it is stored: its number in its stream times N plus the stream. It
  /// is given again where transitions were taken back.
  [[nodiscard]] std::int64_t index_of(const Pick& pick) const noexcept {
    return static_cast<std::int64_t>(pick.sequence * streams_.size() + pick.stream);
  }
  /// The transition of that name; throws std::out_of_range where none is stored.
  [[nodiscard]] Pick find(std::int64_t index) const;
  /// The transition of this number. Precondition: it is stored.
  [[nodiscard]] Pick pick_at(std::size_t s, std::uint64_t sequence) const noexcept {
    return streams_[s].pick(static_cast<std::uint32_t>(s), streams_[s].back(sequence));
  }
  /// Whether an episode begins with a stored transition: nothing older is kept, or does not lead to it.
  [[nodiscard]] bool begins(const Pick& pick) const noexcept;
  /// The names of all transitions, stream after stream and oldest first.
  [[nodiscard]] std::vector<std::int64_t> indices() const;
  /// Batch number `draw`, of `count` sequences of `length` transitions of a stream each. All that are stored
  /// are equally likely. Refuses a length that no stream has.
  [[nodiscard]] Sequences sequences(std::uint64_t draw, std::size_t count, std::size_t length) const;
  /// The stream; throws std::out_of_range where there is none.
  [[nodiscard]] std::size_t require_stream(std::int64_t stream) const;
  /// Ring positions of the `frames` [F] up to and with `position`, oldest first; before the first frame of an
  /// episode, that frame again. `back` is the transition's distance from the newest. O(F).
  void frames(const Stream& stream, std::uint32_t position, std::uint32_t back,
              std::span<std::uint32_t> out) const noexcept;

  [[nodiscard]] std::size_t slots() const noexcept { return slots_; }
  [[nodiscard]] std::size_t used_slots() const noexcept { return slots_ - free_.size(); }
  [[nodiscard]] const std::vector<std::size_t>& sizes() const noexcept { return sizes_; }

  std::uint64_t seed;  // the key of the random numbers

 private:
  [[nodiscard]] std::uint32_t take_slot() noexcept;
  void release(std::size_t row) noexcept {
    if (aside_[row]) free_slot(row);
  }
  void free_slot(std::size_t row) noexcept;
  void resize(Stream& stream, std::uint32_t size) noexcept;
  void add_to(Group& group, std::size_t s) const {
    if (streams_[s].reach() > 0) group.add(s, streams_[s].reach());
  }
  [[nodiscard]] std::size_t first_cell(std::size_t s) const noexcept {
    return s == 0 ? 0 : cells_.ends[s - 1];
  }

  std::vector<Stream> streams_;     // N
  std::vector<std::size_t> sizes_;  // [T] transitions of each task
  std::size_t size_ = 0;            // their sum
  Links links_;
  std::vector<bool> aside_;          // [rows] whether the link names a slot: read without touching the row
  std::vector<std::uint32_t> free_;  // side slots, each once, the last first to go; its capacity is slots_
  std::size_t slots_ = 0;
  Jumps jumps_;
  Strata all_;          // of the request without tasks and weights
  bool stale_ = false;  // a reach changed since all_ was made
  Group cells_;         // of all streams
  std::optional<Priorities> priorities_;
  std::vector<std::uint32_t> seen_;  // [N] the call of require_streams that named a stream last
  std::uint32_t calls_ = 0;
};

// Here for the sake of whoever adds many: most transitions depart and end nothing.

inline std::uint32_t ReplayIndex::take_slot() noexcept {
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

inline void ReplayIndex::resize(Stream& stream, std::uint32_t size) noexcept {
  const std::uint32_t before = stream.reach();
  std::size_t& of_task = sizes_[static_cast<std::size_t>(stream.task)];
  of_task = of_task - stream.size + size;
  size_ = size_ - stream.size + size;
  stream.size = size;
  stale_ = stale_ || stream.reach() != before;
}

inline Placement ReplayIndex::append(std::size_t s, bool departs, bool terminated, bool truncated) noexcept {
  Stream& stream = streams_[s];
  jumps_.count += departs ? 1 : 0;
  ++jumps_.of;
  if (stream.kept + 1 == stream.ring) {  // the oldest row makes place for the next head
    release(stream.first_row + stream.position(stream.kept - 1));
    --stream.kept;
    // With a ring of two rows, that was the newest row; where the head was its successor, nobody needs it.
    if (stream.kept == 0) departs = false;
  }
  Placement place{stream.first_row + stream.next, 0, -1, 0};
  if (departs) {
    const std::size_t newest = stream.first_row + stream.position(0);
    const std::uint32_t slot = take_slot();
    links_.set(newest, links_.get(newest) | (slot + 1));
    aside_[newest] = true;
    place.moved = slot;
  }
  stream.next = stream.after(stream.next);
  ++stream.kept;
  ++stream.count;
  if (stream.size < stream.capacity) resize(stream, stream.size + 1);
  if (priorities_) priorities_->renew(first_cell(s) + stream.phase);
  stream.phase = stream.phase + 1 == stream.capacity ? 0 : stream.phase + 1;
  stream.head_valid = !terminated && !truncated;
  place.link = (terminated ? kTerminated : 0) | (truncated ? kTruncated : 0);
  if (stream.head_valid) {
    place.successor = static_cast<std::int64_t>(stream.first_row + stream.next);
  } else {
    const std::uint32_t slot = take_slot();
    place.link |= slot + 1;
    aside_[place.row] = true;
    place.successor = -1 - static_cast<std::int64_t>(slot);
  }
  return place;
}

/// The elements of one batch, in order.
class Picker {
 public:
  /// Batch number `draw`, of `count` elements, from element `first` on. The index and the strata must outlive
  /// it unchanged.
  Picker(const ReplayIndex& index, const Strata& strata, std::uint64_t draw, std::size_t count,
         std::size_t first = 0) noexcept;
  /// The next elements, their steps 0: `count` at most over all calls. O(log N) each.
  void fill(std::span<Pick> picks) noexcept;

 private:
  void begin_group() noexcept;

  const ReplayIndex& index_;
  const Strata& strata_;
  const std::uint64_t seed_;
  const std::uint64_t draw_;
  const std::size_t count_;
  const double offset_;  // in [0, 1): element i stands at (i + offset) / count of the shares
  std::size_t group_ = 0;
  std::size_t end_ = 0;  // element after the last of the group
  std::size_t i_ = 0;
  BoundedDraw bounded_{1};
};

}  // namespace brc
