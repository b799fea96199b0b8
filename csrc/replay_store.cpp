#include "replay_store.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "philox.hpp"
#include "replay_checks.hpp"

namespace brc {
namespace {

// The rows stored, one more successor aside per stream and a spare block of slots stay below kSlot slots.
constexpr std::size_t kMaxRows = std::size_t{1} << 29;
constexpr std::size_t kMaxWidth = std::size_t{1} << 28;  // so that byte counts stay below 2^63

constexpr std::size_t kAhead = 4;              // rows between a prefetch and its use
constexpr std::size_t kPrefetchFloats = 1024;  // of a longer row, the processor fetches the rest by itself

}  // namespace

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
