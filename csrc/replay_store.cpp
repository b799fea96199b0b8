#include "replay_store.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "philox.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace brc {
namespace {

// The last word of a row, its link: two flags, and the side slot of the successor plus one (zero: no slot).
constexpr std::uint32_t kTerminated = 1u << 31;
constexpr std::uint32_t kTruncated = 1u << 30;
constexpr std::uint32_t kSlot = kTruncated - 1;

// The rows stored, one more successor aside per stream and a spare block of slots stay below kSlot slots.
constexpr std::size_t kMaxRows = std::size_t{1} << 29;
constexpr std::size_t kMaxWidth = std::size_t{1} << 28;  // so that byte counts stay below 2^63

constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kAhead = 4;              // rows between a prefetch and its use
constexpr std::size_t kPrefetchFloats = 1024;  // of a longer row, the processor fetches the rest by itself

using std::to_string;

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument(message);
}

std::size_t require_size(const char* name, std::int64_t value, std::size_t largest) {
  if (value < 1) refuse(std::string(name) + " must be at least 1, got " + to_string(value));
  if (static_cast<std::size_t>(value) > largest) {
    refuse(std::string(name) + " must be at most " + to_string(largest) + ", got " + to_string(value));
  }
  return static_cast<std::size_t>(value);
}

void require_length(const char* name, std::size_t got, std::size_t wanted) {
  if (got != wanted)
    refuse(std::string(name) + " must hold " + to_string(wanted) + " values, got " + to_string(got));
}

template <bool Const>
void require_lengths(const TransitionColumns<Const>& columns, std::size_t rows, std::size_t successors,
                     std::size_t O, std::size_t A) {
  require_length("observations", columns.observations.size(), rows * O);
  require_length("actions", columns.actions.size(), rows * A);
  require_length("rewards", columns.rewards.size(), rows);
  require_length("terminated", columns.terminated.size(), rows);
  require_length("truncated", columns.truncated.size(), rows);
  require_length("successors", columns.successors.size(), successors * O);
}

/// Refuses a value that is not finite; `where(row)` says what a row of the column is. The scan vectorizes.
template <class Where>
void require_finite(const char* name, std::span<const float> values, std::size_t width, const Where& where) {
  const auto not_finite = [](float value) {
    return (std::bit_cast<std::uint32_t>(value) & 0x7F800000u) == 0x7F800000u;
  };
  std::uint32_t found = 0;
  for (const float value : values) found |= static_cast<std::uint32_t>(not_finite(value));
  if (found == 0) return;
  const auto first = std::find_if(values.begin(), values.end(), not_finite) - values.begin();
  refuse(std::string(name) + " of " + where(static_cast<std::size_t>(first) / width) +
         " must be finite, got " + to_string(values[static_cast<std::size_t>(first)]) +
         "; nothing was stored");
}

template <class Where>
void require_finite(const TransitionColumns<true>& columns, std::size_t O, std::size_t A,
                    const Where& where) {
  require_finite("observations", columns.observations, O, where);
  require_finite("actions", columns.actions, A, where);
  require_finite("rewards", columns.rewards, 1, where);
  require_finite("successors", columns.successors, O, where);
}

void copy(std::span<float> to, std::size_t index, const float* from, std::size_t width) {
  std::memcpy(to.data() + index * width, from, width * sizeof(float));
}

}  // namespace

RowBlock::RowBlock(std::size_t rows, std::size_t width, const char* what)
    : stride_(row_bytes(width) / sizeof(float)) {
  const std::size_t bytes = rows * row_bytes(width);
  const std::size_t alignment = bytes < kHugePage ? 64 : kHugePage;
  nbytes_ = (bytes + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<float*>(std::aligned_alloc(alignment, nbytes_)));
  if (!data_) {
    throw OutOfMemory("cannot reserve " + to_string(nbytes_) + " bytes for " + what + ": " + to_string(rows) +
                      " rows of " + to_string(row_bytes(width)) + " bytes; lower capacity");
  }
#if defined(__linux__)
  // Advice: a refusal costs only speed.
  if (alignment == kHugePage) madvise(data_.get(), nbytes_, MADV_HUGEPAGE);
#endif
}

SideStore::SideStore(std::size_t width)
    : width_(width), slots_per_block_(std::max<std::size_t>(1, kHugePage / RowBlock::row_bytes(width))) {}

void SideStore::reserve(std::size_t wanted) {
  while (slots() < wanted) {
    const std::size_t first = slots();
    free_.reserve(first + slots_per_block_);
    blocks_.emplace_back(slots_per_block_, width_, "successors kept aside");
    for (std::size_t slot = slots(); slot-- > first;) free_.push_back(static_cast<std::uint32_t>(slot));
  }
}

std::uint32_t SideStore::put(const float* values) noexcept {
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  std::memcpy(blocks_[slot / slots_per_block_].row(slot % slots_per_block_), values, width_ * sizeof(float));
  return slot;
}

const float* SideStore::at(std::uint32_t slot) const noexcept {
  return blocks_[slot / slots_per_block_].row(slot % slots_per_block_);
}

std::size_t SideStore::nbytes() const noexcept {
  return slots() * sizeof(std::uint32_t) + (blocks_.empty() ? 0 : blocks_.size() * blocks_[0].nbytes());
}

std::uint32_t ReplayStore::Stream::position(std::uint32_t age) const noexcept {
  const std::uint32_t pos = next + (ring - size) + age;  // below 2^31, as ring <= kMaxRows
  return pos < ring ? pos : pos - ring;
}

ReplayStore::ReplayStore(std::int64_t capacity, std::int64_t observation_size, std::int64_t action_size,
                         std::span<const std::int64_t> task_ids, std::uint64_t seed)
    : O_(require_size("observation_size", observation_size, kMaxWidth)),
      A_(require_size("action_size", action_size, kMaxWidth)),
      streams_(make_streams(require_size("capacity", capacity, kMaxRows), task_ids)),
      rows_(streams_.back().first_row + streams_.back().ring, O_ + A_ + 2, "the replay store"),
      side_(O_),
      seed_(seed) {}

std::vector<ReplayStore::Stream> ReplayStore::make_streams(std::size_t capacity,
                                                           std::span<const std::int64_t> task_ids) {
  if (task_ids.empty()) refuse("task_ids must hold the task of at least one stream, got none");
  std::vector<std::size_t> counts(task_ids.size());
  for (const std::int64_t task : task_ids) {
    if (task < 0 || static_cast<std::size_t>(task) >= counts.size()) {
      refuse("task_ids of " + to_string(counts.size()) + " streams must lie in 0.." +
             to_string(counts.size() - 1) + ", got " + to_string(task));
    }
    ++counts[static_cast<std::size_t>(task)];
  }
  const auto tasks = static_cast<std::size_t>(std::ranges::max(task_ids)) + 1;
  for (std::size_t task = 0; task < tasks; ++task) {
    if (counts[task] == 0) {
      refuse("task_ids must name every task of 0.." + to_string(tasks - 1) + ", but none is " +
             to_string(task));
    }
  }
  std::vector<Stream> streams;
  std::size_t first_row = 0;
  for (const std::int64_t task : task_ids) {
    const std::size_t count = counts[static_cast<std::size_t>(task)];
    const std::size_t ring = (capacity + count - 1) / count + 1;
    streams.push_back({task, first_row, static_cast<std::uint32_t>(ring)});
    first_row += ring;
  }
  if (first_row > kMaxRows) {
    refuse("capacity " + to_string(capacity) + " for " + to_string(tasks) + " tasks in " +
           to_string(streams.size()) + " streams needs " + to_string(first_row) +
           " rows, and a store has at most " + to_string(kMaxRows));
  }
  return streams;
}

void ReplayStore::add(std::span<const std::int64_t> ids, const TransitionColumns<true>& columns) {
  const std::lock_guard lock(mutex_);
  std::vector<bool> seen(streams_.size());
  for (const std::int64_t id : ids) {
    if (id < 0 || static_cast<std::size_t>(id) >= streams_.size()) {
      refuse("streams must lie in 0.." + to_string(streams_.size() - 1) + ", got " + to_string(id));
    }
    if (seen[static_cast<std::size_t>(id)]) refuse("streams must differ, got " + to_string(id) + " twice");
    seen[static_cast<std::size_t>(id)] = true;
  }
  const auto stream_at = [&](std::size_t i) -> Stream& { return streams_[static_cast<std::size_t>(ids[i])]; };
  require_lengths(columns, ids.size(), ids.size(), O_, A_);
  const auto where = [&](std::size_t i) {
    return "stream " + to_string(ids[i]) + " (task " + to_string(stream_at(i).task) + ")";
  };
  require_finite(columns, O_, A_, where);

  std::size_t slots = side_.used();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + kAhead < ids.size()) {
      const Stream& ahead = stream_at(i + kAhead);
      const Location target = at(ahead, ahead.next);
      prefetch(target);
      __builtin_prefetch(target.following + O_ + A_ + 1);  // the link of the row to drop
    }
    slots += departs(stream_at(i), columns.observations.data() + i * O_);
    slots += columns.terminated[i] || columns.truncated[i];
  }
  side_.reserve(slots);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    append(stream_at(i), transition(columns, i, columns.successors.data() + i * O_));
  }
}

void ReplayStore::append(Stream& stream, const Transition& t) noexcept {
  if (stream.size + 1 == stream.ring) drop_oldest(stream);
  if (departs(stream, t.observation)) {
    float* newest = row(stream, stream.position(stream.size - 1));
    set_link(newest, link(newest) | (side_.put(row(stream, stream.next)) + 1));
  }
  float* to = row(stream, stream.next);
  std::memcpy(to, t.observation, O_ * sizeof(float));
  std::memcpy(to + O_, t.action, A_ * sizeof(float));
  to[O_ + A_] = t.reward;
  stream.next = stream.after(stream.next);
  ++stream.size;
  stream.head_valid = !t.terminated && !t.truncated;
  std::uint32_t word = (t.terminated ? kTerminated : 0) | (t.truncated ? kTruncated : 0);
  if (stream.head_valid) {
    std::memcpy(row(stream, stream.next), t.successor, O_ * sizeof(float));
  } else {
    word |= side_.put(t.successor) + 1;
  }
  set_link(to, word);
}

void ReplayStore::drop_oldest(Stream& stream) noexcept {
  const std::uint32_t slot = link(row(stream, stream.position(0))) & kSlot;
  if (slot != 0) side_.release(slot - 1);
  --stream.size;
  stream.head_valid = stream.head_valid && stream.size != 0;
}

/// Whether `observation` would overwrite a successor that differs from it.
bool ReplayStore::departs(const Stream& stream, const float* observation) const noexcept {
  return stream.head_valid && std::memcmp(row(stream, stream.next), observation, O_ * sizeof(float)) != 0;
}

void ReplayStore::sample(std::size_t num_batches, std::size_t batch_size, const BatchColumns& out) {
  const std::lock_guard lock(mutex_);
  require_batch(num_batches * batch_size, out);
  std::vector<std::uint32_t> ends;  // transitions stored in the streams up to and with each
  std::uint32_t end = 0;
  for (const Stream& stream : streams_) ends.push_back(end += stream.size);
  if (end == 0) refuse("the replay store is empty; add transitions before sampling");
  const std::uint32_t size = streams_[0].size;
  const bool equal =
      std::ranges::all_of(streams_, [size](const Stream& stream) { return stream.size == size; });

  std::vector<Location> locations(batch_size);
  for (std::size_t batch = 0; batch < num_batches; ++batch, ++draws_) {
    for (std::size_t i = 0; i < batch_size; ++i) {
      const std::uint32_t k = bounded_draw(seed_, draws_, static_cast<std::uint32_t>(i), end);
      const std::size_t s =
          equal ? k / size : static_cast<std::size_t>(std::ranges::upper_bound(ends, k) - ends.begin());
      const Stream& stream = streams_[s];
      locations[i] = at(stream, stream.position(k - (ends[s] - stream.size)));
    }
    gather(locations, batch * batch_size, out);
  }
}

void ReplayStore::read(std::int64_t stream, std::int64_t age, const BatchColumns& out) const {
  const std::lock_guard lock(mutex_);
  require_batch(1, out);
  const auto check = [](const char* name, std::int64_t index, std::size_t count) {
    if (index >= 0 && static_cast<std::size_t>(index) < count) return static_cast<std::size_t>(index);
    throw std::out_of_range(std::string(name) + " must lie below " + to_string(count) + ", got " +
                            to_string(index));
  };
  const Stream& from = streams_[check("stream", stream, streams_.size())];
  const auto known_age = static_cast<std::uint32_t>(check("age", age, from.size));
  const Location location = at(from, from.position(known_age));
  gather({&location, 1}, 0, out);
}

ReplayStore::Location ReplayStore::at(const Stream& stream, std::uint32_t pos) const noexcept {
  return {row(stream, pos), row(stream, stream.after(pos)), stream.task};
}

void ReplayStore::prefetch(const Location& location) const noexcept {
  const auto fetch = [](const float* data, std::size_t floats) {
    for (std::size_t i = 0; i < std::min(floats, kPrefetchFloats); i += 16) __builtin_prefetch(data + i);
  };
  fetch(location.row, O_ + A_ + 2);
  fetch(location.following, O_);
}

void ReplayStore::gather(std::span<const Location> locations, std::size_t first,
                         const BatchColumns& out) const noexcept {
  for (std::size_t i = 0; i < std::min(kAhead, locations.size()); ++i) prefetch(locations[i]);
  for (std::size_t i = 0; i < locations.size(); ++i) {
    if (i + kAhead < locations.size()) prefetch(locations[i + kAhead]);
    const Location& from = locations[i];
    const std::uint32_t flags = link(from.row);
    const std::uint32_t slot = flags & kSlot;
    copy(out.observations, first + i, from.row, O_);
    copy(out.actions, first + i, from.row + O_, A_);
    copy(out.next_observations, first + i, slot != 0 ? side_.at(slot - 1) : from.following, O_);
    out.rewards[first + i] = from.row[O_ + A_];
    out.masks[first + i] = (flags & kTerminated) != 0 ? 0.0f : 1.0f;
    out.task_ids[first + i] = from.task;
  }
}

void ReplayStore::save(const StateColumns<false>& out) const {
  const std::lock_guard lock(mutex_);
  require_state(total(), side_.used(), out);
  std::size_t n = 0;
  std::size_t m = 0;
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    const Stream& stream = streams_[s];
    out.sizes[s] = stream.size;
    for (std::uint32_t age = 0; age < stream.size; ++age, ++n) {
      const float* from = row(stream, stream.position(age));
      const std::uint32_t flags = link(from);
      const std::uint32_t slot = flags & kSlot;
      copy(out.rows.observations, n, from, O_);
      copy(out.rows.actions, n, from + O_, A_);
      out.rows.rewards[n] = from[O_ + A_];
      out.rows.terminated[n] = (flags & kTerminated) != 0;
      out.rows.truncated[n] = (flags & kTruncated) != 0;
      out.has_successor[n] = slot != 0;
      if (slot != 0) copy(out.rows.successors, m++, side_.at(slot - 1), O_);
    }
    out.head_valid[s] = stream.head_valid;
    std::fill_n(out.heads.begin() + static_cast<std::ptrdiff_t>(s * O_), O_, 0.0f);
    if (stream.head_valid) copy(out.heads, s, row(stream, stream.next), O_);
  }
}

void ReplayStore::load(const StateColumns<true>& state, std::uint64_t seed, std::uint64_t draws) {
  const std::lock_guard lock(mutex_);
  const TransitionColumns<true>& rows = state.rows;
  const auto side_rows =
      std::ranges::count_if(state.has_successor, [](unsigned char flag) { return flag != 0; });
  require_state(rows.rewards.size(), static_cast<std::size_t>(side_rows), state);
  const auto at_row = [](std::size_t i) { return "row " + to_string(i); };
  const auto at_stream = [](std::size_t i) { return "stream " + to_string(i); };
  require_finite(rows, O_, A_, at_row);
  require_finite("heads", state.heads, O_, at_stream);
  std::size_t left = rows.rewards.size();
  bool fits = true;
  for (const std::int64_t size : state.sizes) {
    fits = fits && size >= 0 && static_cast<std::size_t>(size) <= left;
    if (fits) left -= static_cast<std::size_t>(size);
  }
  if (!fits || left != 0) {
    refuse("sizes must not be negative and must sum to the " + to_string(rows.rewards.size()) +
           " rows of rewards");
  }
  for (std::size_t i = 0; i < rows.rewards.size(); ++i) {
    if ((rows.terminated[i] || rows.truncated[i]) && !state.has_successor[i]) {
      refuse("has_successor of row " + to_string(i) + " must be set, as its episode ended there");
    }
  }
  std::size_t end = 0;
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    end += static_cast<std::size_t>(state.sizes[s]);
    const bool head_expected = state.sizes[s] > 0 && !state.has_successor[end - 1];
    if ((state.head_valid[s] != 0) != head_expected) {
      refuse("head_valid of stream " + to_string(s) + " must be " + (head_expected ? "true" : "false") +
             ", the opposite of has_successor of its newest row, and false without rows");
    }
  }
  side_.reserve(static_cast<std::size_t>(side_rows));

  for (Stream& stream : streams_) {
    while (stream.size != 0) drop_oldest(stream);
  }
  std::size_t i = 0;
  std::size_t side_row = 0;
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    Stream& stream = streams_[s];
    for (auto rest = static_cast<std::size_t>(state.sizes[s]); rest > 0; --rest, ++i) {
      const float* successor =
          rest == 1 ? state.heads.data() + s * O_ : rows.observations.data() + (i + 1) * O_;
      if (state.has_successor[i]) successor = rows.successors.data() + side_row++ * O_;
      append(stream, transition(rows, i, successor));
    }
  }
  seed_ = seed;
  draws_ = draws;
}

template <bool Const>
void ReplayStore::require_state(std::size_t rows, std::size_t side_rows,
                                const StateColumns<Const>& state) const {
  require_length("sizes", state.sizes.size(), streams_.size());
  require_lengths(state.rows, rows, side_rows, O_, A_);
  require_length("has_successor", state.has_successor.size(), rows);
  require_length("heads", state.heads.size(), streams_.size() * O_);
  require_length("head_valid", state.head_valid.size(), streams_.size());
}

void ReplayStore::require_batch(std::size_t rows, const BatchColumns& out) const {
  require_length("observations", out.observations.size(), rows * O_);
  require_length("actions", out.actions.size(), rows * A_);
  require_length("rewards", out.rewards.size(), rows);
  require_length("masks", out.masks.size(), rows);
  require_length("next_observations", out.next_observations.size(), rows * O_);
  require_length("task_ids", out.task_ids.size(), rows);
}

ReplayStore::Transition ReplayStore::transition(const TransitionColumns<true>& columns, std::size_t i,
                                                const float* successor) const noexcept {
  return {columns.observations.data() + i * O_, columns.actions.data() + i * A_, columns.rewards[i],
          columns.terminated[i] != 0,           columns.truncated[i] != 0,       successor};
}

std::uint32_t ReplayStore::link(const float* row) const noexcept {
  std::uint32_t word;
  std::memcpy(&word, row + O_ + A_ + 1, sizeof(word));
  return word;
}

void ReplayStore::set_link(float* row, std::uint32_t link) const noexcept {
  std::memcpy(row + O_ + A_ + 1, &link, sizeof(link));
}

std::vector<std::int64_t> ReplayStore::sizes() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::int64_t> sizes;
  for (const Stream& stream : streams_) sizes.push_back(stream.size);
  return sizes;
}

std::vector<std::int64_t> ReplayStore::capacities() const {
  std::vector<std::int64_t> capacities;
  for (const Stream& stream : streams_) capacities.push_back(stream.ring - 1);
  return capacities;
}

std::size_t ReplayStore::total() const noexcept {
  std::size_t total = 0;
  for (const Stream& stream : streams_) total += stream.size;
  return total;
}

}  // namespace brc
