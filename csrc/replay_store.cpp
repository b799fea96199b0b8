#include "replay_store.hpp"

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "finite.hpp"

namespace brc {
namespace {

constexpr std::size_t kAhead = 8;               // rows between a prefetch and its use
constexpr std::size_t kLine = 64;               // bytes of a cache line
constexpr std::size_t kPrefetchBytes = 256;     // of a row to read
constexpr std::size_t kPrefetchWritten = 4096;  // of a row to write

constexpr std::uint32_t kEdge = 1u << 31;  // marks the last row of a ring; rows have 29 bits

template <int write = 0>
[[gnu::always_inline]] inline void fetch(const std::byte* data, std::size_t bytes) noexcept {
  for (std::size_t i = 0; i < std::min(bytes, kPrefetchBytes); i += kLine)
    __builtin_prefetch(data + i, write);
}

void put(MutableBytes to, std::size_t index, const std::byte* from, std::size_t bytes) noexcept {
  std::memcpy(to.data() + index * bytes, from, bytes);
}

float reward_at(const std::byte* row, const Layout& layout) noexcept {
  float reward;
  std::memcpy(&reward, row + layout.reward, sizeof(reward));
  return reward;
}

}  // namespace

ReplayStore::ReplayStore(Layout layout, std::span<const std::int64_t> capacities,
                         std::span<const std::int64_t> task_ids, std::uint64_t seed, bool allow_not_finite)
    : layout_(std::move(layout)),
      allow_not_finite_(allow_not_finite),
      index_(capacities, task_ids, static_cast<std::int64_t>(layout_.stack), seed),
      rows_(index_.rows(), layout_.stride, "the replay store"),
      side_(layout_.observation.bytes),
      all_streams_(task_ids.size()),
      departs_(task_ids.size()) {
  index_.bind({rows_.row(0) + layout_.link, layout_.stride});
  std::iota(all_streams_.begin(), all_streams_.end(), 0);
}

void ReplayStore::reserve_slots(std::size_t more) {
  index_.reserve_slots(more);
  side_.reserve(std::min(index_.slots(), index_.used_slots() + more + 1));
}

void ReplayStore::add(std::span<const std::int64_t> ids, const TransitionColumns& columns) {
  const std::unique_lock lock(mutex_);
  if (ids.data() != all_streams_.data()) index_.require_streams(ids);
  require_columns(columns, layout_, ids.size());
  const std::size_t frame = layout_.observation.bytes;
  const auto& streams = index_.streams();
  const auto stream_at = [&](std::size_t i) { return static_cast<std::size_t>(ids[i]); };

  std::size_t slots = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + kAhead < ids.size()) {
      fetch<1>(rows_.row(index_.head_row(stream_at(i + kAhead))), std::min(frame, kPrefetchWritten));
    }
    const std::size_t s = stream_at(i);
    departs_[i] = streams[s].head_valid && std::memcmp(rows_.row(index_.head_row(s)),
                                                       columns.observations.data() + i * frame, frame) != 0;
    slots += departs_[i];
    slots += columns.terminated[i] || columns.truncated[i];
  }
  if (!allow_not_finite_) require_finite(ids, columns);
  reserve_slots(slots);

  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (i + kAhead < ids.size()) {
      const Stream& ahead = streams[stream_at(i + kAhead)];
      const std::byte* following = rows_.row(ahead.first_row + ahead.after(ahead.next));
      __builtin_prefetch(rows_.row(ahead.first_row + ahead.next) + layout_.link, 1);
      fetch<1>(following, std::min(frame, kPrefetchWritten));
      __builtin_prefetch(following + layout_.link);  // of the row to drop
    }
    const std::size_t s = stream_at(i);
    const bool known = streams[s].head_valid && !departs_[i];  // the row holds its observation already
    const Placement to =
        index_.append(s, departs_[i] != 0, columns.terminated[i] != 0, columns.truncated[i] != 0);
    std::byte* row = rows_.row(to.row);
    if (to.moved >= 0) std::memcpy(side_.at(static_cast<std::size_t>(to.moved)), row, frame);
    if (!known) std::memcpy(row, columns.observations.data() + i * frame, frame);
    for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
      const std::size_t bytes = layout_.fields[f].bytes;
      std::memcpy(row + layout_.offsets[f], columns.fields[f].data() + i * bytes, bytes);
    }
    std::memcpy(row + layout_.reward, &columns.rewards[i], sizeof(float));
    std::byte* successor = to.successor >= 0 ? rows_.row(static_cast<std::size_t>(to.successor))
                                             : side_.at(static_cast<std::size_t>(-1 - to.successor));
    std::memcpy(successor, columns.successors.data() + i * frame, frame);
  }
  index_.refresh();
}

void ReplayStore::require_finite(std::span<const std::int64_t> ids, const TransitionColumns& columns) const {
  const auto require_column = [&](const char* name, const Field& field, Bytes values) {
    const std::size_t i = first_not_finite(values, field.kind) / (field.bytes / field.item);
    if (i < ids.size()) {
      require_finite(name, field, values.subspan(i * field.bytes, field.bytes), ids[i]);
    }
  };
  const Field& frame = layout_.observation;
  if (frame.kind != Kind::integer) {
    for (std::size_t i = 0; i < ids.size(); ++i) {
      // An observation that equals the last successor was looked at when it came.
      if (index_.streams()[static_cast<std::size_t>(ids[i])].head_valid && departs_[i] == 0) continue;
      require_finite("observations", frame, columns.observations.subspan(i * frame.bytes, frame.bytes),
                     ids[i]);
    }
    require_column("successors", frame, columns.successors);
  }
  for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
    const Field& field = layout_.fields[f];
    if (field.kind != Kind::integer) require_column(field.name.c_str(), field, columns.fields[f]);
  }
  const Field reward{"rewards", sizeof(float), sizeof(float), Kind::float32};
  require_column("rewards", reward, std::as_bytes(columns.rewards));
}

void ReplayStore::require_finite(const char* name, const Field& field, Bytes values,
                                 std::int64_t stream) const {
  const std::size_t i = first_not_finite(values, field.kind);
  if (i == values.size() / field.item || field.kind == Kind::integer) return;
  refuse(std::string(name) + " of stream " + to_string(stream) + " (task " +
         to_string(index_.streams()[static_cast<std::size_t>(stream)].task) + ") must be finite, got " +
         to_string(value_at(values, field.kind, i)) + "; nothing was stored");
}

void ReplayStore::gather_ahead(const Request& request, std::uint64_t draw, std::size_t num_batches,
                               std::size_t batch_size, const BatchColumns& out, Ahead& ahead) const {
  const std::shared_lock lock(mutex_);
  require_columns(out, layout_, num_batches * batch_size);
  index_.require_request(request, batch_size);
  ahead.picks.resize(num_batches * batch_size);
  ahead.life = life_;
  Strata scratch;
  const Strata& strata = index_.strata(request, scratch);
  for (std::size_t u = 0; u < num_batches; ++u) {
    const std::span<Pick> picks = std::span(ahead.picks).subspan(u * batch_size, batch_size);
    Picker(index_, strata, draw + u, batch_size).fill(picks);
    gather(picks, request, u * batch_size, out);
  }
}

std::size_t ReplayStore::settle(const Request& request, std::size_t num_batches, std::size_t batch_size,
                                const BatchColumns& out, Ahead& ahead) {
  const std::shared_lock lock(mutex_);
  require_columns(out, layout_, num_batches * batch_size);
  index_.require_request(request, batch_size);
  const bool fresh = ahead.picks.size() == num_batches * batch_size && ahead.life == life_;
  Strata scratch;
  const Strata& strata = index_.strata(request, scratch);
  std::vector<Pick> picks(batch_size);
  std::uint64_t draw = draws_.fetch_add(num_batches);
  std::size_t changed = 0;
  for (std::size_t u = 0; u < num_batches; ++u, ++draw) {
    Picker(index_, strata, draw, batch_size).fill(picks);
    if (!fresh) {
      gather(picks, request, u * batch_size, out);
      changed += batch_size;
      continue;
    }
    for (std::size_t i = 0; i < batch_size; ++i) {
      Pick& now = picks[i];
      const Pick& before = ahead.picks[u * batch_size + i];
      const bool same = before.stream == now.stream && before.sequence == now.sequence;
      // Fewer steps than asked for may have become more: the newest transition has followers now.
      if (same && (before.steps == request.powers.size() ||
                   before.steps == index_.window(now, request.powers.size()).steps)) {
        continue;
      }
      gather_one(now, request, u * batch_size + i, out);
      ++changed;
    }
  }
  return changed;
}

void ReplayStore::read(std::int64_t stream, std::int64_t age, const Request& request,
                       const BatchColumns& out) const {
  const std::shared_lock lock(mutex_);
  require_columns(out, layout_, 1);
  const auto check = [](const char* name, std::int64_t index, std::size_t count) {
    if (index >= 0 && static_cast<std::size_t>(index) < count) return static_cast<std::size_t>(index);
    throw std::out_of_range(std::string(name) + " must lie below " + to_string(count) + ", got " +
                            to_string(index));
  };
  const std::size_t s = check("stream", stream, num_streams());
  const Stream& from = index_.streams()[s];
  const std::size_t known_age = check("age", age, from.size);
  const std::uint64_t sequence = from.count - from.size + known_age;
  const std::uint32_t pos = from.position(from.back(sequence));
  Pick pick{static_cast<std::uint32_t>(s), 0, sequence, from.first_row + pos};
  gather_one(pick, request, 0, out);
}

// Inlined by force: a call of a function that only prefetches has no result, and GCC 12 removes it. The
// processor follows a row by itself after its first lines. Past a ring's edge this fetches for nothing.
[[gnu::always_inline]] inline void ReplayStore::prefetch(const Pick& pick,
                                                         std::size_t n_step) const noexcept {
  const std::byte* row = rows_.row(pick.row);
  fetch(row, std::min(layout_.used, kPrefetchBytes));
  if (n_step == 1) return;
  for (std::size_t step = 0; step < n_step; ++step)
    __builtin_prefetch(row + step * layout_.stride + layout_.link);
  fetch(row + n_step * layout_.stride, std::min(layout_.observation.bytes, kPrefetchBytes));
}

void ReplayStore::gather(std::span<Pick> picks, const Request& request, std::size_t first,
                         const BatchColumns& out) const noexcept {
  const std::size_t n_step = request.powers.size();
  if (n_step == 1 && layout_.stack == 1) {
    gather_plain(picks, first, out);
    return;
  }
  for (std::size_t i = 0; i < std::min(kAhead, picks.size()); ++i) prefetch(picks[i], n_step);
  for (std::size_t i = 0; i < picks.size(); ++i) {
    if (i + kAhead < picks.size()) prefetch(picks[i + kAhead], n_step);
    gather_one(picks[i], request, first + i, out);
  }
}

void ReplayStore::gather_fields(const std::byte* row, std::size_t i, const BatchColumns& out) const noexcept {
  for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
    put(out.fields[f], i, row + layout_.offsets[f], layout_.fields[f].bytes);
  }
}

void ReplayStore::gather_plain(std::span<Pick> picks, std::size_t first,
                               const BatchColumns& out) const noexcept {
  // The loads that wait for memory take all places for lines on their way into the first cache. So the loop
  // that copies reads as little else as it can: one word per row, not picks and streams.
  std::array<std::uint32_t, 1024> rows;
  for (std::size_t begin = 0; begin < picks.size(); begin += rows.size()) {
    const std::span<Pick> part = picks.subspan(begin, std::min(rows.size(), picks.size() - begin));
    for (std::size_t i = 0; i < part.size(); ++i) {
      const Stream& stream = index_.streams()[part[i].stream];
      const bool edge = part[i].row + 1 == stream.first_row + stream.ring;
      rows[i] = static_cast<std::uint32_t>(part[i].row) | (edge ? kEdge : 0);
      out.task_ids[first + begin + i] = stream.task;
      part[i].steps = 1;
    }
    copy_plain(std::span(rows).first(part.size()), part, first + begin, out);
  }
}

void ReplayStore::copy_plain(std::span<const std::uint32_t> rows, std::span<const Pick> picks,
                             std::size_t first, const BatchColumns& out) const noexcept {
  // In locals, as a copy through a byte pointer makes the compiler read members again; instructions between
  // the loads that wait cost time here.
  const std::byte* const base = rows_.row(0);
  const std::size_t stride = layout_.stride;
  const std::size_t bytes = layout_.observation.bytes;
  const std::size_t action_offset = layout_.offsets[0];
  const std::size_t action_bytes = layout_.fields[0].bytes;
  const std::size_t reward_offset = layout_.reward;
  const bool more = layout_.fields.size() > 1;
  const bool long_rows = layout_.used >= kPrefetchBytes;
  std::byte* observations = out.observations.data() + first * bytes;
  std::byte* next_observations = out.next_observations.data() + first * bytes;
  std::byte* actions = out.fields[0].data() + first * action_bytes;
  float* rewards = out.rewards.data() + first;
  float* masks = out.masks.data() + first;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i + kAhead < rows.size()) {
      const std::byte* ahead = base + (rows[i + kAhead] & ~kEdge) * stride;
      __builtin_prefetch(ahead);
      if (long_rows) {
        __builtin_prefetch(ahead + kLine);
        __builtin_prefetch(ahead + 2 * kLine);
        __builtin_prefetch(ahead + 3 * kLine);
      }
    }
    const std::byte* const row = base + (rows[i] & ~kEdge) * stride;
    std::memcpy(observations, row, bytes);
    std::memcpy(actions, row + action_offset, action_bytes);
    std::uint32_t word;
    std::memcpy(&word, row + reward_offset + sizeof(float), sizeof(word));
    // Branches, which the processor guesses: an address made from the link would wait for it to arrive.
    if ((word & kSlot) != 0) {
      std::memcpy(next_observations, side_.at((word & kSlot) - 1), bytes);
    } else if ((rows[i] & kEdge) != 0) {
      std::memcpy(next_observations, rows_.row(index_.streams()[picks[i].stream].first_row), bytes);
    } else {
      std::memcpy(next_observations, row + stride, bytes);
    }
    std::memcpy(rewards + i, row + reward_offset, sizeof(float));
    masks[i] = (word & kTerminated) != 0 ? 0.0f : 1.0f;
    if (more) gather_fields(row, first + i, out);
    observations += bytes;
    next_observations += bytes;
    actions += action_bytes;
  }
}

void ReplayStore::gather_one(Pick& pick, const Request& request, std::size_t i,
                             const BatchColumns& out) const noexcept {
  const Stream& stream = index_.streams()[pick.stream];
  const Window window = index_.window(pick, request.powers.size());
  pick.steps = window.steps;
  const std::byte* row = rows_.row(window.row);
  if (layout_.stack == 1) {
    put(out.observations, i, row, layout_.observation.bytes);
    put(out.next_observations, i, place(window.successor), layout_.observation.bytes);
  } else {
    gather_frames(pick, window, i, out);
  }
  gather_fields(row, i, out);
  float reward = reward_at(row, layout_);
  std::uint32_t pos = window.position;
  for (std::uint32_t step = 1; step < window.steps; ++step) {
    pos = stream.after(pos);
    reward += request.powers[step] * reward_at(rows_.row(stream.first_row + pos), layout_);
  }
  out.rewards[i] = reward;
  out.masks[i] = window.terminated ? 0.0f : request.powers[window.steps - 1];
  out.task_ids[i] = stream.task;
}

void ReplayStore::gather_frames(const Pick& pick, const Window& window, std::size_t i,
                                const BatchColumns& out) const noexcept {
  const Stream& stream = index_.streams()[pick.stream];
  const std::size_t frame = layout_.observation.bytes;
  const std::size_t stack = layout_.stack;
  std::array<std::uint32_t, 64> small;
  std::vector<std::uint32_t> large(stack > small.size() ? stack : 0);
  const std::span<std::uint32_t> positions = stack > small.size() ? std::span(large) : std::span(small);
  const auto put_frames = [&](std::uint32_t pos, std::uint32_t back, std::size_t count, MutableBytes to) {
    index_.frames(stream, pos, back, positions.first(count));
    for (std::size_t f = 0; f < count; ++f) {
      put(to, i * stack + f, rows_.row(stream.first_row + positions[f]), frame);
    }
  };
  const std::uint32_t back = stream.back(pick.sequence);
  put_frames(window.position, back, stack, out.observations);
  put_frames(window.last, back - (window.steps - 1), stack - 1, out.next_observations);
  put(out.next_observations, i * stack + stack - 1, place(window.successor), frame);
}

ReplayIndex ReplayStore::index() const {
  return reading([this] { return index_; });
}

void ReplayStore::adopt(const ReplayIndex& index, std::uint64_t draws) {
  const std::unique_lock lock(mutex_);
  if (index.rows() != index_.rows()) refuse("the index must have the rows of the store");
  side_.reserve(index.slots());
  std::vector<std::uint32_t> links(index.rows());
  for (std::size_t row = 0; row < links.size(); ++row) links[row] = index.link(row);
  index_ = index;
  index_.bind({rows_.row(0) + layout_.link, layout_.stride});
  Links own(rows_.row(0) + layout_.link, layout_.stride);
  for (std::size_t row = 0; row < links.size(); ++row) own.set(row, links[row]);
  draws_ = draws;
  ++life_;
}

std::byte* ReplayStore::slot(std::size_t slot) {
  side_.reserve(slot + 1);
  return side_.at(slot);
}

std::vector<std::int64_t> ReplayStore::sizes() const {
  const std::shared_lock lock(mutex_);
  std::vector<std::int64_t> sizes;
  for (const Stream& stream : index_.streams()) sizes.push_back(stream.size);
  return sizes;
}

std::vector<std::int64_t> ReplayStore::capacities() const {
  const std::shared_lock lock(mutex_);
  std::vector<std::int64_t> capacities;
  for (const Stream& stream : index_.streams()) capacities.push_back(stream.capacity);
  return capacities;
}

}  // namespace brc
