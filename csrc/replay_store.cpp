#include "replay_store.hpp"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "finite.hpp"
#include "vector_clones.hpp"

namespace brc {
namespace {

constexpr std::size_t kLine = 64;                          // bytes of a cache line
constexpr std::size_t kGroup = 16;                         // rows put together before they are written
constexpr std::size_t kSliceBytes = std::size_t{1} << 20;  // sampled at once while writers wait, but for
constexpr std::size_t kFewest = 64;                        // transitions at least
constexpr std::size_t kLookBytes = std::size_t{1} << 14;   // of a column, looked at twice while they are near
constexpr std::size_t kWrites = 8;              // rows between a request for a place in a batch and its use
constexpr std::uint32_t kForked = 0xFFFFFFFEu;  // words that make the seed of a child; no element has them

/// How far memory is asked for ahead of a copy: `rows` of them, and so many `bytes` of each.
struct Reach {
  std::size_t rows, bytes;
  bool follows;  // the processor follows a row, and what is written, by itself after the first lines
};

/// Intel's processors follow, and requests for further lines only take the places of those on their way. The
/// rest (Zen 5 was measured) wait for every line that nobody asked for.
Reach reach_of_processor() noexcept {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return {8, 384, true};
#endif
  return {12, 1024, false};
}

const Reach kReach = reach_of_processor();

constexpr std::uint32_t kApart =
    1u << 31;  // marks a row that its successor does not follow; rows have 29 bits

using Vector = char __attribute__((vector_size(32)));

/// memcpy without its call, for parts of rows.
BRC_INLINE void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  constexpr std::size_t kVector = sizeof(Vector);
  if (bytes < kVector || bytes > 1024) {
    std::memcpy(to, from, bytes);
    return;
  }
  Vector part;
  for (std::size_t at = 0; at + kVector <= bytes; at += kVector) {
    std::memcpy(&part, from + at, kVector);
    std::memcpy(to + at, &part, kVector);
  }
  std::memcpy(&part, from + bytes - kVector, kVector);  // the rest, with what comes before it
  std::memcpy(to + bytes - kVector, &part, kVector);
}

/// Where nothing follows, past the outer caches: rows would drive out the batch, which is written soon.
[[gnu::always_inline]] inline void fetch(const std::byte* data, std::size_t bytes, bool follows) noexcept {
  for (std::size_t i = 0; i < bytes; i += kLine) {
    if (follows) {
      __builtin_prefetch(data + i);
    } else {
      __builtin_prefetch(data + i, 0, 0);
    }
  }
}

[[gnu::always_inline]] inline void fetch_to_write(std::byte* data, std::size_t bytes) noexcept {
  for (std::size_t i = 0; i < bytes; i += kLine) __builtin_prefetch(data + i, 1);
}

/// Copies whole lines past the caches: a row is written long before it is read, and a line that is written
/// whole need not come from memory first. finish_stream() must follow before others look.
void stream_lines(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
#if defined(__SSE2__)
  for (std::size_t at = 0; at < bytes; at += sizeof(__m128i)) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), part);
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

/// Of the lines of a row that hold more than its observation.
std::size_t tail_bytes(const Layout& layout) noexcept {
  return layout.stride - layout.observation.bytes / kLine * kLine;
}

void finish_stream() noexcept {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void put(MutableBytes to, std::size_t index, const std::byte* from, std::size_t bytes) noexcept {
  std::memcpy(to.data() + index * bytes, from, bytes);
}

float reward_at(const std::byte* row, const Layout& layout) noexcept {
  float reward;
  std::memcpy(&reward, row + layout.reward, sizeof(reward));
  return reward;
}

/// Whether bytes differ; memcmp without its call.
BRC_INLINE bool differ(const std::byte* one, const std::byte* other, std::size_t bytes) noexcept {
  constexpr std::size_t kVector = sizeof(Vector);
  if (bytes < kVector || bytes > 1024) return std::memcmp(one, other, bytes) != 0;
  Vector found{};
  const auto look = [&](std::size_t at) __attribute__((always_inline)) {
    Vector a, b;
    std::memcpy(&a, one + at, kVector);
    std::memcpy(&b, other + at, kVector);
    found |= a ^ b;
  };
  for (std::size_t at = 0; at + kVector <= bytes; at += kVector) look(at);
  look(bytes - kVector);
  std::array<std::uint64_t, kVector / sizeof(std::uint64_t)> words;
  std::memcpy(words.data(), &found, kVector);
  std::uint64_t any = 0;
  for (const std::uint64_t word : words) any |= word;
  return any != 0;
}

/// Puts together what of the rows of some transitions, from `first` on, `observations` [G] do not fill with
/// lines of their own, but for links: `tails` [G]. Whether observations differ from `heads` [G], where those
/// are `valid`, goes to `departs` [G].
BRC_VECTOR_CLONES void put_together(const Layout& layout, const TransitionColumns& columns,
                                    const std::byte* observations, std::size_t first,
                                    std::span<const std::byte* const> heads, const bool* valid,
                                    std::byte* tails, unsigned char* departs) noexcept {
  const std::size_t frame = layout.observation.bytes;
  const std::size_t tail = tail_bytes(layout);
  const std::size_t whole = layout.stride - tail;
  const std::span<const Field> fields = layout.fields;
  for (std::size_t g = 0; g < heads.size(); ++g, tails += tail) {
    const std::size_t i = first + g;
    const std::byte* const from = observations + g * frame;
    departs[g] = valid[g] && differ(heads[g], from, frame);
    copy_bytes(tails, from + whole, frame - whole);
    for (std::size_t f = 0; f < fields.size(); ++f) {
      const std::size_t bytes = fields[f].bytes;
      copy_bytes(tails + layout.offsets[f] - whole, columns.fields[f].data() + i * bytes, bytes);
    }
    std::memcpy(tails + layout.reward - whole, &columns.rewards[i], sizeof(float));
    std::memset(tails + layout.link - whole, 0, sizeof(std::uint32_t));
  }
}

/// Marks rows from `first` on whose observation differs from where the row before led.
BRC_VECTOR_CLONES void find_jumps(const std::byte* seen, const std::byte* led, std::size_t bytes,
                                  std::size_t first, std::size_t end, unsigned char* jumps) noexcept {
  for (std::size_t i = first; i < end; ++i)
    jumps[i] |= differ(led + (i - 1) * bytes, seen + i * bytes, bytes);
}

/// Where the parts of a row are.
struct RowParts {
  const std::byte* base;
  std::size_t stride, frame, action_offset, action, reward;
};

struct PlainColumns {
  std::byte *observations, *next_observations, *actions;
  float *rewards, *masks;
};

constexpr float kElsewhere = -1.0f;  // in place of a mask

/// Copies transitions whose successors lie in the following row. Others get the mask kElsewhere, and no
/// successor that holds.
BRC_VECTOR_CLONES void copy_transitions(const RowParts parts, std::span<const std::uint32_t> rows,
                                        PlainColumns out) noexcept {
  const auto [ahead, most, follows] = kReach;
  const std::size_t wanted = std::min(parts.stride + parts.frame, most);
  for (std::size_t i = 0; i < std::min(ahead, rows.size()); ++i) {
    fetch(parts.base + (rows[i] & ~kApart) * parts.stride, wanted, follows);
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (i + ahead < rows.size()) {
      fetch(parts.base + (rows[i + ahead] & ~kApart) * parts.stride, wanted, follows);
    }
    if (!follows) {
      fetch_to_write(out.observations + kWrites * parts.frame, std::min(parts.frame, most));
      fetch_to_write(out.next_observations + kWrites * parts.frame, std::min(parts.frame, most));
      fetch_to_write(out.actions + kWrites * parts.action, std::min(parts.action, most));
    }
    const std::byte* const row = parts.base + (rows[i] & ~kApart) * parts.stride;
    copy_bytes(out.observations, row, parts.frame);
    copy_bytes(out.actions, row + parts.action_offset, parts.action);
    const bool apart = (rows[i] & kApart) != 0;
    if (!apart) copy_bytes(out.next_observations, row + parts.stride, parts.frame);
    std::memcpy(out.rewards + i, row + parts.reward, sizeof(float));
    std::uint32_t word;
    std::memcpy(&word, row + parts.reward + sizeof(float), sizeof(word));
    out.masks[i] = apart || (word & (kSlot | kTerminated)) != 0 ? kElsewhere : 1.0f;
    out.observations += parts.frame;
    out.next_observations += parts.frame;
    out.actions += parts.action;
  }
}

}  // namespace

ReplayStore::ReplayStore(Layout layout, std::span<const std::int64_t> capacities,
                         std::span<const std::int64_t> task_ids, std::uint64_t seed, bool allow_not_finite,
                         std::optional<double> alpha)
    : layout_(std::move(layout)),
      allow_not_finite_(allow_not_finite),
      index_(capacities, task_ids, static_cast<std::int64_t>(layout_.stack), seed, alpha),
      rows_(index_.rows(), layout_.stride, "the replay store"),
      heads_(task_ids.size(), Layout::align(layout_.observation.bytes, kLine), "the newest successors"),
      side_(layout_.observation.bytes),
      all_streams_(task_ids.size()),
      departs_(task_ids.size()),
      ends_(task_ids.size()),
      departed_(task_ids.size(), heads_.stride(), "the newest successors"),
      tails_(kGroup, tail_bytes(layout_), "rows to come") {
  std::memset(tails_.row(0), 0, tails_.nbytes());
  index_.bind({rows_.row(0) + layout_.link, layout_.stride});
  std::iota(all_streams_.begin(), all_streams_.end(), 0);
}

void ReplayStore::reserve_slots(std::size_t more) {
  index_.reserve_slots(more);
  side_.reserve(std::min(index_.slots(), index_.used_slots() + more + 1));
}

Bytes ReplayStore::joined(const Columns<Bytes>& parts, std::size_t first, std::size_t count,
                          std::vector<std::byte>& memory) const {
  const std::size_t frame = layout_.observation.bytes;
  if (layout_.parts.size() == 1) return parts[0].subspan(first * frame, count * frame);
  if (memory.size() < count * frame) memory.resize(count * frame);  // the gaps are zero, and stay so
  for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
    const std::size_t bytes = layout_.parts[p].field.bytes;
    std::byte* to = memory.data() + layout_.parts[p].offset;
    for (std::size_t i = 0; i < count; ++i, to += frame) {
      copy_bytes(to, parts[p].data() + (first + i) * bytes, bytes);
    }
  }
  return {memory.data(), count * frame};
}

void ReplayStore::add(std::span<const std::int64_t> ids, const TransitionColumns& columns) {
  const std::unique_lock lock(mutex_);
  append(ids, columns);
}

bool ReplayStore::add_if_first(std::span<const std::int64_t> ids, const TransitionColumns& columns) {
  if (!mutex_.lock_if_first()) return false;
  const std::unique_lock lock(mutex_, std::adopt_lock);
  append(ids, columns);
  return true;
}

void ReplayStore::append(std::span<const std::int64_t> ids, const TransitionColumns& columns) {
  if (ids.data() != all_streams_.data()) {
    given_.assign(ids.begin(), ids.end());
    ids = given_;
    index_.require_streams(ids);
  }
  require_columns(columns, layout_, ids.size());
  const Bytes seen = joined(columns.observations, 0, ids.size(), seen_);
  const Bytes led = joined(columns.successors, 0, ids.size(), led_);
  const bool finite = stage(ids, columns, seen, led);
  try {
    if (!finite && !allow_not_finite_) require_finite(ids, columns);
    std::size_t slots = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ends_[i] =
          (columns.terminated[i] != 0 ? kTerminated : 0) | (columns.truncated[i] != 0 ? kTruncated : 0);
      slots += std::size_t{departs_[i]} + (ends_[i] != 0);
    }
    reserve_slots(slots);
    reserve_saved(ids);
  } catch (...) {
    unstage(ids, seen);
    throw;
  }
  for (std::size_t i = 0; i < ids.size(); ++i) commit(static_cast<std::size_t>(ids[i]), i);
  index_.refresh();
}

bool ReplayStore::stage(std::span<const std::int64_t> ids, const TransitionColumns& columns, Bytes seen,
                        Bytes led) noexcept {
  const Field& observation = layout_.observation;
  const std::size_t frame = observation.bytes;
  const std::size_t tail = tail_bytes(layout_);
  const std::size_t whole = layout_.stride - tail;
  bool finite = all_finite(std::as_bytes(columns.rewards), Kind::float32);
  for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
    finite = finite && all_finite(columns.fields[f], layout_.fields[f].kind);
  }
  if (layout_.parts.size() > 1) {
    for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
      const Kind kind = layout_.parts[p].field.kind;
      finite = finite && all_finite(columns.observations[p], kind) && all_finite(columns.successors[p], kind);
    }
  }
  // In groups: what was put together from small parts is best read again some time later.
  std::array<std::byte*, kGroup> rows;
  std::array<std::byte*, kGroup> heads;
  std::array<bool, kGroup> valid;
  for (std::size_t begin = 0; begin < ids.size(); begin += kGroup) {
    const std::size_t count = std::min(kGroup, ids.size() - begin);
    for (std::size_t g = 0; g < count; ++g) {
      const auto s = static_cast<std::size_t>(ids[begin + g]);
      rows[g] = rows_.row(index_.head_row(s));
      heads[g] = heads_.row(s);
      valid[g] = index_.streams()[s].head_valid;
    }
    const std::byte* const observations = seen.data() + begin * frame;
    put_together(layout_, columns, observations, begin, std::span(heads).first(count), valid.data(),
                 tails_.row(0), &departs_[begin]);
    for (std::size_t g = 0; g < count; ++g) {
      // An observation that equals the last successor was looked at when it came.
      if (valid[g] && departs_[begin + g] == 0) continue;
      finite = finite && all_finite({observations + g * frame, frame}, observation.kind);
      if (valid[g]) std::memcpy(departed_.row(begin + g), heads[g], frame);
    }
    finite &= copy_finite(std::span(heads).first(count), led.data() + begin * frame, frame, observation.kind);
    for (std::size_t g = 0; g < count; ++g) {
      stream_lines(rows[g], observations + g * frame, whole);
      stream_lines(rows[g] + whole, tails_.row(g), tail);
    }
  }
  finish_stream();
  return finite;
}

void ReplayStore::unstage(std::span<const std::int64_t> ids, Bytes seen) noexcept {
  const std::size_t frame = layout_.observation.bytes;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto s = static_cast<std::size_t>(ids[i]);
    if (!index_.streams()[s].head_valid) continue;
    std::memcpy(heads_.row(s), departs_[i] ? departed_.row(i) : seen.data() + i * frame, frame);
  }
}

void ReplayStore::commit(std::size_t s, std::size_t i) noexcept {
  if (save_ != nullptr) {  // the head is staged over
    keep_for_save(s, departs_[i] != 0 ? departed_.row(i) : rows_.row(index_.head_row(s)));
  }
  const Placement to =
      index_.append(s, departs_[i] != 0, (ends_[i] & kTerminated) != 0, (ends_[i] & kTruncated) != 0);
  if (to.moved >= 0) keep_aside(to.moved, departed_.row(i));
  if (to.link != 0) index_.set_link(to.row, to.link);
  if (to.successor < 0) keep_aside(-1 - to.successor, heads_.row(s));
}

bool ReplayStore::look_at(const TransitionColumns& columns, std::span<unsigned char> jumps) const noexcept {
  const std::size_t count = jumps.size();
  bool finite = all_finite(std::as_bytes(columns.rewards), Kind::float32);
  for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
    finite = finite && all_finite(columns.fields[f], layout_.fields[f].kind);
  }
  for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
    const Field& field = layout_.parts[p].field;
    const Bytes seen = columns.observations[p];
    const Bytes led = columns.successors[p];
    const std::size_t most = std::max<std::size_t>(1, kLookBytes / field.bytes);
    for (std::size_t first = 0; first < count; first += most) {
      const std::size_t end = std::min(first + most, count);
      finite =
          finite && all_finite(seen.subspan(first * field.bytes, (end - first) * field.bytes), field.kind);
      if (led.empty()) continue;
      find_jumps(seen.data(), led.data(), field.bytes, std::max<std::size_t>(first, 1), end, jumps.data());
    }
    // A successor that equals the next observation was looked at there.
    for (std::size_t i = 0; i < count && !led.empty(); ++i) {
      if (i + 1 < count && jumps[i + 1] == 0) continue;
      finite = finite && all_finite(led.subspan(i * field.bytes, field.bytes), field.kind);
    }
  }
  for (std::size_t i = 1; i < count; ++i) {
    if ((columns.terminated[i - 1] | columns.truncated[i - 1]) != 0) jumps[i] = 0;
  }
  return finite;
}

std::size_t ReplayStore::extend(std::int64_t stream, const TransitionColumns& columns) {
  const std::size_t s = index_.require_stream(stream);
  const std::size_t count = columns.rewards.size();
  const bool following = columns.successors[0].empty();  // the next observation is the successor
  const bool told = !columns.starts.empty();
  if (following) {
    TransitionColumns whole = columns;
    whole.successors = columns.observations;
    require_columns(whole, layout_, count);
  } else {
    require_columns(columns, layout_, count);
  }
  if (told) require_length("starts", columns.starts.size(), count, "values");
  std::vector<unsigned char> jumps(count);  // whether an observation is not what the row before led to
  if (!look_at(columns, jumps) && !allow_not_finite_) {
    const auto require_column = [&](const std::string& name, const Field& field, Bytes values) {
      const std::size_t row = first_not_finite(values, field.kind) / (field.bytes / field.item);
      if (row >= count) return;
      require_finite((name + " in row " + to_string(row)).c_str(), field,
                     values.subspan(row * field.bytes, field.bytes), stream);
    };
    for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
      const Field& field = layout_.parts[p].field;
      require_column(field.name, field, columns.observations[p]);
      if (!following) require_column("successors (" + field.name + ")", field, columns.successors[p]);
    }
    for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
      require_column(layout_.fields[f].name, layout_.fields[f], columns.fields[f]);
    }
    require_column("rewards", {"rewards", sizeof(float), sizeof(float), Kind::float32},
                   std::as_bytes(columns.rewards));
  }
  const auto starts = [&](std::size_t i) { return told && columns.starts[i] != 0; };
  const auto unknown = [&](std::size_t i) {  // where the action led
    return following && columns.terminated[i] == 0 &&
           (columns.truncated[i] != 0 || i + 1 == count || starts(i + 1));
  };
  const std::size_t frame = layout_.observation.bytes;
  const std::size_t tail = tail_bytes(layout_);
  const std::size_t whole = layout_.stride - tail;
  const std::size_t most = std::max(kGroup, kSliceBytes / layout_.stride);
  std::size_t stored = 0;
  for (std::size_t slice = 0; slice < count; slice += most) {
    const std::size_t rows = std::min(most, count - slice);
    const std::unique_lock lock(mutex_);
    const Bytes seen = joined(columns.observations, slice, std::min(rows + 1, count - slice), seen_);
    const Bytes led = following ? Bytes{} : joined(columns.successors, slice, rows, led_);
    const auto successor_of = [&](std::size_t i) {
      if (!following) return led.data() + i * frame;
      return seen.data() + (columns.terminated[slice + i] != 0 ? i : i + 1) * frame;
    };
    reserve_slots(2 * rows);
    if (save_ != nullptr) reserve_saved({&stream, 1}, rows);
    const std::byte* head = heads_.row(s);  // where the newest transition led, if the stream goes on from it
    std::array<const std::byte*, kGroup> heads;
    std::array<bool, kGroup> valid;
    std::array<unsigned char, kGroup> departs;
    heads.fill(head);
    for (std::size_t begin = 0; begin < rows; begin += kGroup) {
      const std::size_t group = std::min(kGroup, rows - begin);
      const std::byte* const observations = seen.data() + begin * frame;
      if (begin + 2 * kGroup <= rows) fetch(observations + kGroup * frame, kGroup * frame, kReach.follows);
      valid.fill(false);
      valid[0] = begin == 0 && index_.streams()[s].head_valid;
      put_together(layout_, columns, observations, slice + begin, std::span(heads).first(group), valid.data(),
                   tails_.row(0), departs.data());
      for (std::size_t g = 0; g < group; ++g) {
        const std::size_t i = slice + begin + g;
        const bool left_out = unknown(i);
        if (save_ != nullptr && !left_out) keep_for_save(s, head);
        const std::int64_t slot = left_out || starts(i) ? index_.leave(s) : -1;
        if (slot >= 0) keep_aside(slot, head);
        if (left_out) continue;
        const bool jump = !starts(i) && (begin + g == 0 ? departs[0] : jumps[i]) != 0;
        const Placement to = index_.append(s, jump, columns.terminated[i] != 0, columns.truncated[i] != 0);
        if (to.moved >= 0) keep_aside(to.moved, head);
        std::byte* const end = tails_.row(0) + g * tail;
        std::memcpy(end + layout_.link - whole, &to.link, sizeof(to.link));
        stream_lines(rows_.row(to.row), observations + g * frame, whole);
        stream_lines(rows_.row(to.row) + whole, end, tail);
        head = successor_of(begin + g);
        if (to.successor < 0) keep_aside(-1 - to.successor, head);
        ++stored;
      }
    }
    finish_stream();
    if (index_.streams()[s].head_valid && head != heads_.row(s)) std::memcpy(heads_.row(s), head, frame);
    index_.refresh();
  }
  return stored;
}

std::pair<std::unique_lock<std::mutex>, std::unique_lock<FairLock>> ReplayStore::alone() const {
  std::unique_lock saving(saving_);
  return {std::move(saving), std::unique_lock(mutex_)};
}

void ReplayStore::after_fork_in_child(std::uint64_t number) noexcept {
  // Those who waited for these locks, or held the other one, are threads of the parent.
  new (&mutex_) FairLock();
  new (&saving_) std::mutex();
  save_ = nullptr;
  const auto words = draw_words(index_.seed, number, kForked, 0);
  index_.seed = std::uint64_t{words[0]} << 32 | words[1];
}

void ReplayStore::clear() {
  const auto locks = alone();
  ++life_;
  index_.clear();
}

void ReplayStore::clear(std::span<const std::int64_t> ids) {
  const auto locks = alone();
  index_.require_streams(ids);
  ++life_;
  for (const std::int64_t id : ids) index_.clear(static_cast<std::size_t>(id));
  index_.refresh();
}

std::size_t ReplayStore::discard_episode(std::int64_t stream) {
  const auto locks = alone();
  const std::size_t taken = index_.discard_episode(index_.require_stream(stream));
  index_.refresh();
  ++life_;
  return taken;
}

void ReplayStore::reset(std::span<const std::int64_t> ids) {
  const auto locks = alone();
  index_.require_streams(ids);
  reserve_slots(ids.size());
  for (const std::int64_t id : ids) {
    const auto s = static_cast<std::size_t>(id);
    const std::int64_t slot = index_.leave(s);
    if (slot >= 0) keep_aside(slot, heads_.row(s));
  }
}

void ReplayStore::require_finite(std::span<const std::int64_t> ids, const TransitionColumns& columns) const {
  const auto require_column = [&](const char* name, const Field& field, Bytes values) {
    const std::size_t i = first_not_finite(values, field.kind) / (field.bytes / field.item);
    if (i < ids.size()) {
      require_finite(name, field, values.subspan(i * field.bytes, field.bytes), ids[i]);
    }
  };
  const bool one = layout_.parts.size() == 1;
  for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
    const Field& frame = layout_.parts[p].field;
    if (frame.kind == Kind::integer) continue;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      // An observation that equals the last successor was looked at when it came.
      if (index_.streams()[static_cast<std::size_t>(ids[i])].head_valid && departs_[i] == 0) continue;
      require_finite(one ? "observations" : frame.name.c_str(), frame,
                     columns.observations[p].subspan(i * frame.bytes, frame.bytes), ids[i]);
    }
    require_column(one ? "successors" : ("successors of " + frame.name).c_str(), frame,
                   columns.successors[p]);
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

namespace {

/// Transitions that are gathered at once.
std::size_t slice_of(const Layout& layout) {
  const std::size_t bytes = 2 * layout.stack * layout.observation.bytes + layout.stride;
  return std::max(kFewest, kSliceBytes / bytes);
}

}  // namespace

template <class Draw, class Use>
void ReplayStore::pick_in_slices(const Request& request, std::size_t num_batches, std::size_t batch_size,
                                 const BatchColumns& out, const Draw& draw, const Use& use) const {
  require_columns(out, layout_, num_batches * batch_size);
  require_length("weights", out.weights.size(), request.beta ? num_batches * batch_size : 0, "values");
  const std::size_t bytes =
      2 * layout_.stack * layout_.observation.bytes + layout_.stride;  // of a transition
  const std::size_t most = std::max(kFewest, kSliceBytes / bytes);
  std::vector<Pick> picks(std::min(batch_size, most));
  std::vector<double> shares(request.beta ? batch_size : 0);
  std::uint64_t number = 0;
  for (std::size_t u = 0; u < num_batches; ++u) {
    std::size_t begin = 0;
    do {  // also for a batch of nothing, which is refused
      const std::span<Pick> part = std::span(picks).first(std::min(most, batch_size - begin));
      const std::shared_lock lock(mutex_);
      index_.require_request(request, batch_size);
      Strata scratch;
      const Strata& strata = index_.strata(request, scratch);
      if (u == 0 && begin == 0) number = draw();  // nothing is refused from here on
      index_.draw(request, strata, number + u, batch_size, begin, part);
      if (request.beta) index_.shares(part, std::span(shares).subspan(begin, part.size()));
      use(u * batch_size + begin, part);
    } while ((begin += most) < batch_size);
    if (request.beta) weigh(shares, *request.beta, out.weights.subspan(u * batch_size, batch_size));
  }
}

void ReplayStore::gather_ahead(const Request& request, std::uint64_t draw, std::size_t num_batches,
                               std::size_t batch_size, const BatchColumns& out, Ahead& ahead) const {
  ahead.picks.clear();
  std::vector<Pick> gathered;
  gathered.reserve(num_batches * batch_size);
  bool whole = true;
  // One priority that changed moves the shares of all others.
  const auto version = [&] { return request.beta ? index_.priorities()->version() : 0; };
  const auto begin = [&] {
    ahead.life = life_;
    ahead.priorities = version();
    return draw;
  };
  pick_in_slices(request, num_batches, batch_size, out, begin, [&](std::size_t first, std::span<Pick> picks) {
    gather(picks, request, first, out);
    gathered.insert(gathered.end(), picks.begin(), picks.end());
    whole = whole && ahead.life == life_ && ahead.priorities == version();
  });
  if (whole) ahead.picks = std::move(gathered);
}

std::size_t ReplayStore::settle(const Request& request, std::size_t num_batches, std::size_t batch_size,
                                const BatchColumns& out, Ahead& ahead) {
  const bool gathered = ahead.picks.size() == num_batches * batch_size;
  const auto version = [&] { return request.beta ? index_.priorities()->version() : 0; };
  std::size_t changed = 0;
  std::optional<std::uint64_t> number;
  const auto begin = [&] { return *(number = draws_.fetch_add(num_batches)); };
  const auto use = [&](std::size_t first, std::span<Pick> picks) {
    if (!gathered || ahead.life != life_ || ahead.priorities != version()) {
      gather(picks, request, first, out);
      changed += picks.size();
      return;
    }
    for (std::size_t i = 0; i < picks.size(); ++i) {
      const Pick& before = ahead.picks[first + i];
      Pick& now = picks[i];
      const bool same = before.stream == now.stream && before.sequence == now.sequence;
      // Fewer steps than asked for may have become more: the newest transition has followers now.
      if (same && (before.steps == request.powers.size() ||
                   before.steps == index_.window(now, request.powers.size()).steps)) {
        continue;
      }
      gather_one(now, request, first + i, out);
      ++changed;
    }
  };
  try {
    pick_in_slices(request, num_batches, batch_size, out, begin, use);
  } catch (...) {  // batches that nobody got do not count, unless others have drawn meanwhile
    if (number) {
      std::uint64_t after = *number + num_batches;
      draws_.compare_exchange_strong(after, *number);
    }
    throw;
  }
  return changed;
}

void ReplayStore::read(std::span<const std::int64_t> indices, const Request& request,
                       const BatchColumns& out) const {
  require_columns(out, layout_, indices.size());
  std::vector<Pick> picks;
  const std::size_t most = slice_of(layout_);
  for (std::size_t begin = 0; begin < indices.size(); begin += most) {
    const std::shared_lock lock(mutex_);
    picks.clear();
    for (const std::int64_t index : indices.subspan(begin, std::min(most, indices.size() - begin))) {
      picks.push_back(index_.find(index));
    }
    gather(picks, request, begin, out);
  }
}

std::vector<unsigned char> ReplayStore::begins(std::span<const std::int64_t> indices) const {
  return reading([&] {
    std::vector<unsigned char> begins;
    for (const std::int64_t index : indices) begins.push_back(index_.begins(index_.find(index)));
    return begins;
  });
}

std::vector<std::int64_t> ReplayStore::indices() const {
  return reading([this] { return index_.indices(); });
}

Sequences ReplayStore::sequences(std::size_t batch_size, std::size_t length) {
  const std::unique_lock lock(mutex_);  // so that nobody else takes this number before it counts
  Sequences made = index_.sequences(draws_, batch_size, length);
  ++draws_;
  return made;
}

// Inlined by force: a call of a function that only prefetches has no result, and GCC 12 removes it. Past a
// ring's edge this fetches for nothing.
[[gnu::always_inline]] inline void ReplayStore::prefetch(const Pick& pick,
                                                         std::size_t n_step) const noexcept {
  const std::byte* row = rows_.row(pick.row);
  fetch(row, std::min(layout_.used, kReach.bytes), kReach.follows);
  if (n_step == 1) return;
  for (std::size_t step = 0; step < n_step; ++step)
    __builtin_prefetch(row + step * layout_.stride + layout_.link);
  fetch(row + n_step * layout_.stride, std::min(layout_.observation.bytes, kReach.bytes), kReach.follows);
}

void ReplayStore::gather(std::span<Pick> picks, const Request& request, std::size_t first,
                         const BatchColumns& out) const noexcept {
  const std::size_t n_step = request.powers.size();
  if (n_step == 1 && layout_.stack == 1 && layout_.parts.size() == 1) {
    gather_plain(picks, first, out);
    return;
  }
  const std::size_t ahead = kReach.rows;
  for (std::size_t i = 0; i < std::min(ahead, picks.size()); ++i) prefetch(picks[i], n_step);
  for (std::size_t i = 0; i < picks.size(); ++i) {
    if (i + ahead < picks.size()) prefetch(picks[i + ahead], n_step);
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
      const bool newest = part[i].sequence + 1 == stream.count;
      rows[i] = static_cast<std::uint32_t>(part[i].row) | (edge || newest ? kApart : 0);
      out.task_ids[first + begin + i] = stream.task;
      out.indices[first + begin + i] = index_.index_of(part[i]);
      part[i].steps = 1;
    }
    std::ranges::fill(out.steps.subspan(first + begin, part.size()), std::int64_t{1});
    std::ranges::fill(out.terminated.subspan(first + begin, part.size()), static_cast<unsigned char>(0));
    std::ranges::fill(out.truncated.subspan(first + begin, part.size()), static_cast<unsigned char>(0));
    copy_plain(std::span(rows).first(part.size()), part, first + begin, out);
  }
}

void ReplayStore::copy_plain(std::span<const std::uint32_t> rows, std::span<const Pick> picks,
                             std::size_t first, const BatchColumns& out) const noexcept {
  const std::size_t frame = layout_.observation.bytes;
  const std::size_t action = layout_.fields[0].bytes;
  copy_transitions(
      {rows_.row(0), layout_.stride, frame, layout_.offsets[0], action, layout_.reward}, rows,
      {out.observations[0].data() + first * frame, out.next_observations[0].data() + first * frame,
       out.fields[0].data() + first * action, out.rewards.data() + first, out.masks.data() + first});
  // The few whose successor does not lie in the following row.
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (out.masks[first + i] != kElsewhere) continue;
    const std::size_t row = rows[i] & ~kApart;
    const std::uint32_t word = index_.link(row);
    out.masks[first + i] = (word & kTerminated) != 0 ? 0.0f : 1.0f;
    out.terminated[first + i] = (word & kTerminated) != 0;
    out.truncated[first + i] = (word & kTruncated) != 0;
    put(out.next_observations[0], first + i, successor(picks[i].stream, index_.window(picks[i], 1)), frame);
  }
  if (layout_.fields.size() == 1) return;
  for (std::size_t i = 0; i < rows.size(); ++i) gather_fields(rows_.row(rows[i] & ~kApart), first + i, out);
}

void ReplayStore::gather_one(Pick& pick, const Request& request, std::size_t i,
                             const BatchColumns& out) const noexcept {
  const Stream& stream = index_.streams()[pick.stream];
  const Window window = index_.window(pick, request.powers.size());
  pick.steps = window.steps;
  const std::byte* row = rows_.row(window.row);
  gather_observations(pick, window, i, out);
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
  out.terminated[i] = window.terminated;
  out.truncated[i] = window.truncated;
  out.steps[i] = window.steps;
  out.indices[i] = index_.index_of(pick);
}

void ReplayStore::gather_observations(const Pick& pick, const Window& window, std::size_t i,
                                      const BatchColumns& out) const noexcept {
  const Stream& stream = index_.streams()[pick.stream];
  const std::size_t most = layout_.stack;
  std::array<std::uint32_t, kMaxStack> seen_memory, led_memory;
  const std::span seen = std::span(seen_memory).first(most);
  const std::span led = std::span(led_memory).first(most - 1);  // the last one is the successor
  if (most > 1) {
    const std::uint32_t back = stream.back(pick.sequence);
    index_.frames(stream, window.position, back, seen);
    index_.frames(stream, window.last, back - (window.steps - 1), led);
  } else {
    seen[0] = window.position;
  }
  const std::byte* const following = successor(pick.stream, window);
  for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
    const auto& [field, stack, offset] = layout_.parts[p];
    const auto frame = [&](std::uint32_t position) {
      return rows_.row(stream.first_row + position) + offset;
    };
    for (std::size_t f = 0; f < stack; ++f) {
      put(out.observations[p], i * stack + f, frame(seen[most - stack + f]), field.bytes);
    }
    for (std::size_t f = 0; f + 1 < stack; ++f) {
      put(out.next_observations[p], i * stack + f, frame(led[most - stack + f]), field.bytes);
    }
    put(out.next_observations[p], i * stack + stack - 1, following + offset, field.bytes);
  }
}

ReplayIndex ReplayStore::index() const {
  return reading([this] { return index_; });
}

void ReplayStore::adopt(const ReplayIndex& index, std::uint64_t draws) {
  const auto locks = alone();
  if (index.rows() != index_.rows()) refuse("the index must have the rows of the store");
  side_.reserve(index.slots());
  std::vector<std::uint32_t> links(index.rows());
  for (std::size_t row = 0; row < links.size(); ++row) links[row] = index.link(row);
  index_ = index;
  index_.bind({rows_.row(0) + layout_.link, layout_.stride});
  Links own(rows_.row(0) + layout_.link, layout_.stride);
  for (std::size_t row = 0; row < links.size(); ++row) own.set(row, links[row]);
  for (std::size_t s = 0; s < num_streams(); ++s) {
    if (index_.streams()[s].head_valid) {
      std::memcpy(heads_.row(s), rows_.row(index_.head_row(s)), layout_.observation.bytes);
    }
  }
  draws_ = draws;
  ++life_;
}

void ReplayStore::write_heads() {
  const std::unique_lock lock(mutex_);
  for (std::size_t s = 0; s < num_streams(); ++s) {
    if (index_.streams()[s].head_valid) {
      std::memcpy(rows_.row(index_.head_row(s)), heads_.row(s), layout_.observation.bytes);
    }
  }
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
