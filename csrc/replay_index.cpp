#include "replay_index.hpp"

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "philox.hpp"
#include "row_block.hpp"
#include "vector_clones.hpp"

namespace brc {
namespace {

// Side slots: one per row, one more per stream and what an add reserves stay below kSlot.
constexpr std::size_t kMaxRows = std::size_t{1} << 29;
constexpr std::uint32_t kLargestBatch = 0xFFFFFFFFu;
constexpr std::uint32_t kShareQuad = 0xFFFFFFFFu;  // of the word that places the shares; no element has it
constexpr std::size_t kQuads = 64;                 // whose words are drawn together

std::size_t require_size(const char* name, std::int64_t value, std::size_t largest) {
  if (value < 1) refuse(std::string(name) + " must be at least 1, got " + to_string(value));
  if (static_cast<std::size_t>(value) > largest) {
    refuse(std::string(name) + " must be at most " + to_string(largest) + ", got " + to_string(value));
  }
  return static_cast<std::size_t>(value);
}

/// The first attempt's words of the quads from `quad` on.
BRC_VECTOR_CLONES void draw_quads(std::uint64_t seed, std::uint64_t draw, std::uint32_t quad,
                                  std::array<std::array<std::uint32_t, 4>, kQuads>& words) noexcept {
  BRC_INDEPENDENT
  for (std::uint32_t q = 0; q < kQuads; ++q) words[q] = draw_words(seed, draw, quad + q, 0);
}

}  // namespace

Request::Request(std::int64_t n_step, double discount, std::vector<std::int64_t> tasks_,
                 std::vector<double> weights_, std::optional<double> beta_)
    : tasks(std::move(tasks_)), weights(std::move(weights_)), beta(beta_) {
  if (!(discount >= 0.0 && discount <= 1.0)) {
    refuse("discount must lie in 0..1, got " + to_string(discount));
  }
  double power = 1.0;
  for (std::size_t step = 0; step < require_size("n_step", n_step, kMaxStack); ++step, power *= discount) {
    powers.push_back(static_cast<float>(power));
  }
  double sum = 0.0;
  for (const double weight : weights) {
    if (!std::isfinite(weight) || weight < 0.0) {
      refuse("weights must be finite and not negative, got " + to_string(weight));
    }
    sum += weight;
  }
  if (!weights.empty() && !(sum > 0.0 && std::isfinite(sum))) {
    refuse("weights must have a positive, finite sum, got " + to_string(sum));
  }
  if (!beta) return;
  if (!(*beta >= 0.0 && *beta <= 1.0)) refuse("beta must lie in 0..1, got " + to_string(*beta));
  if (!tasks.empty() || !weights.empty()) {
    refuse("beta draws from all tasks by priority: leave out tasks and weights, or draw without beta");
  }
}

ReplayIndex::ReplayIndex(std::span<const std::int64_t> capacities, std::span<const std::int64_t> task_ids,
                         std::int64_t stack_, std::uint64_t seed_, std::optional<double> alpha)
    : seed(seed_) {
  const std::size_t stack = require_size("stack", stack_, kMaxStack);
  if (capacities.empty()) refuse("capacity must be given for at least one task");
  for (const std::int64_t capacity : capacities) require_size("capacity", capacity, kMaxRows);
  if (task_ids.empty()) refuse("task_ids must hold the task of at least one stream, got none");
  const std::size_t tasks = capacities.size();
  std::vector<std::size_t> counts(tasks);
  for (const std::int64_t task : task_ids) {
    if (task < 0 || static_cast<std::size_t>(task) >= tasks) {
      refuse("task_ids must lie in 0.." + to_string(tasks - 1) + ", got " + to_string(task));
    }
    ++counts[static_cast<std::size_t>(task)];
  }
  for (std::size_t task = 0; task < tasks; ++task) {
    if (counts[task] == 0) {
      refuse("task_ids must name every task of 0.." + to_string(tasks - 1) + ", but none is " +
             to_string(task));
    }
  }
  std::size_t row = 0;
  std::size_t cells = 0;
  for (const std::int64_t task : task_ids) {
    const std::size_t count = counts[static_cast<std::size_t>(task)];
    const std::size_t capacity =
        (static_cast<std::size_t>(capacities[static_cast<std::size_t>(task)]) + count - 1) / count;
    const std::size_t ring = capacity + stack;
    streams_.push_back({task, row, static_cast<std::uint32_t>(capacity), static_cast<std::uint32_t>(ring)});
    row += ring;
    cells += capacity;
  }
  if (row > kMaxRows) {
    refuse("capacity for " + to_string(tasks) + " tasks in " + to_string(streams_.size()) +
           " streams needs " + to_string(row) + " rows, and a store has at most " + to_string(kMaxRows));
  }
  for (std::size_t s = 0; s < streams_.size(); ++s) cells_.add(s, streams_[s].capacity);
  try {
    if (alpha) priorities_.emplace(cells, *alpha);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("cannot reserve about " + to_string(13 * cells) + " bytes for the priorities of " +
                      to_string(cells) + " transitions");
  }
  aside_.resize(row);
  sizes_.resize(tasks);
  seen_.resize(streams_.size());
  all_.groups.resize(1);
  all_.shares = {1.0};
}

void ReplayIndex::bind(Links links) {
  links_ = links;
  free_.reserve(slots_);  // so that release() and refresh() allocate nothing
  all_.groups[0].streams.reserve(streams_.size());
  all_.groups[0].ends.reserve(streams_.size());
}

void ReplayIndex::require_streams(std::span<const std::int64_t> ids) {
  if (++calls_ == 0) {
    std::ranges::fill(seen_, 0u);
    calls_ = 1;
  }
  for (const std::int64_t id : ids) {
    if (id < 0 || static_cast<std::size_t>(id) >= streams_.size()) {
      refuse("streams must lie in 0.." + to_string(streams_.size() - 1) + ", got " + to_string(id));
    }
    std::uint32_t& seen = seen_[static_cast<std::size_t>(id)];
    if (seen == calls_) refuse("streams must differ, got " + to_string(id) + " twice");
    seen = calls_;
  }
}

void ReplayIndex::reserve_slots(std::size_t more) {
  if (free_.size() >= more) return;
  // Doubling, so that many small calls cost little; an unused slot costs four bytes here and no page there.
  const std::size_t grown = std::max(slots_ + more - free_.size(), std::min(2 * slots_, kMaxRows));
  free_.reserve(grown);
  std::vector<std::uint32_t> more_slots;
  for (std::size_t slot = grown; slot-- > slots_;) more_slots.push_back(static_cast<std::uint32_t>(slot));
  free_.insert(free_.begin(), more_slots.begin(), more_slots.end());
  slots_ = grown;
}

void ReplayIndex::free_slot(std::size_t row) noexcept {
  free_.push_back((links_.get(row) & kSlot) - 1);
  aside_[row] = false;
}

void ReplayIndex::rewind(std::size_t s, std::uint64_t count) noexcept {
  Stream& stream = streams_[s];
  while (stream.count > count && stream.kept > 0) {
    stream.next = stream.position(0);
    release(stream.first_row + stream.next);
    --stream.kept;
    --stream.count;
    stream.phase = stream.phase == 0 ? stream.capacity - 1 : stream.phase - 1;
    resize(stream, std::min(stream.size, stream.kept));
    stream.head_valid = false;
    if (priorities_) priorities_->remove(first_cell(s) + stream.phase);
  }
}

std::size_t ReplayIndex::discard_episode(std::size_t s) noexcept {
  const Stream& stream = streams_[s];
  const std::uint32_t before = stream.size;
  if (before == 0) return 0;
  std::uint64_t first = stream.count - 1;
  while (first > stream.count - stream.kept && !begins(pick_at(s, first))) --first;
  const std::uint64_t taken = std::min<std::uint64_t>(stream.count - first, before);
  rewind(s, first);
  // Rows that are kept for their frames alone stay so, and below the capacity the first cells are taken.
  const auto size = static_cast<std::uint32_t>(before - taken);
  if (taken > 0) {
    const std::uint32_t oldest = (stream.phase + stream.capacity - size) % stream.capacity;
    if (priorities_) priorities_->rotate(first_cell(s), stream.capacity, oldest);
    adopt(s, stream.count, size, size);
  }
  return static_cast<std::size_t>(taken);
}

std::int64_t ReplayIndex::leave(std::size_t s) noexcept {
  Stream& stream = streams_[s];
  if (!std::exchange(stream.head_valid, false)) return -1;
  const std::size_t newest = stream.first_row + stream.position(0);
  const std::uint32_t slot = take_slot();
  links_.set(newest, links_.get(newest) | (slot + 1));
  aside_[newest] = true;
  return slot;
}

Pick ReplayIndex::find(std::int64_t index) const {
  const auto name = static_cast<std::uint64_t>(index);
  const std::size_t s = index < 0 ? 0 : name % streams_.size();
  const std::uint64_t sequence = name / streams_.size();
  const Stream& stream = streams_[s];
  if (index < 0 || sequence >= stream.count) {
    throw std::out_of_range("index " + to_string(index) + " is of no transition that was added");
  }
  if (sequence < stream.count - stream.size) {
    throw std::out_of_range("the transition with index " + to_string(index) + " has been replaced since");
  }
  return pick_at(s, sequence);
}

bool ReplayIndex::begins(const Pick& pick) const noexcept {
  const Stream& stream = streams_[pick.stream];
  if (stream.back(pick.sequence) + 1 >= stream.kept) return true;
  return (links_.get(pick_at(pick.stream, pick.sequence - 1).row) & kSlot) != 0;
}

std::size_t ReplayIndex::require_stream(std::int64_t stream) const {
  if (stream < 0 || static_cast<std::size_t>(stream) >= streams_.size()) {
    throw std::out_of_range("stream must lie in 0.." + to_string(streams_.size() - 1) + ", got " +
                            to_string(stream));
  }
  return static_cast<std::size_t>(stream);
}

std::vector<std::int64_t> ReplayIndex::indices() const {
  std::vector<std::int64_t> names;
  names.reserve(size_);
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    const Stream& stream = streams_[s];
    for (std::uint64_t sequence = stream.count - stream.size; sequence < stream.count; ++sequence) {
      names.push_back(index_of({static_cast<std::uint32_t>(s), 0, sequence, 0}));
    }
  }
  return names;
}

Sequences ReplayIndex::sequences(std::uint64_t draw, std::size_t count, std::size_t length) const {
  std::vector<std::uint32_t> ends;  // first elements that streams up to and with each have
  std::uint32_t longest = 0;
  for (const Stream& stream : streams_) {
    const std::size_t more = length >= 1 && stream.size >= length ? stream.size - length + 1 : 0;
    ends.push_back((ends.empty() ? 0 : ends.back()) + static_cast<std::uint32_t>(more));
    longest = std::max(longest, stream.size);
  }
  if (ends.back() == 0) {
    refuse("length must lie in 1.." + to_string(longest) + ", the transitions of the longest stream, got " +
           to_string(length));
  }
  const BoundedDraw bounded(ends.back());
  Sequences made;
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t k = 0;
    for (std::uint32_t attempt = 0;; ++attempt) {
      if (bounded(draw_words(seed, draw, static_cast<std::uint32_t>(i / 4), attempt)[i % 4], k)) break;
    }
    const auto s = static_cast<std::size_t>(std::ranges::upper_bound(ends, k) - ends.begin());
    const std::uint64_t first = streams_[s].count - streams_[s].size + k - (s == 0 ? 0 : ends[s - 1]);
    for (std::size_t step = 0; step < length; ++step) {
      const Pick pick = pick_at(s, first + step);
      made.indices.push_back(index_of(pick));
      made.starts.push_back(begins(pick));
    }
  }
  return made;
}

void ReplayIndex::clear() noexcept {
  for (std::size_t s = 0; s < streams_.size(); ++s) clear(s);
  if (priorities_) priorities_->clear(1.0f);
  count_jumps_anew();
  refresh();
}

void ReplayIndex::clear(std::size_t s) noexcept {
  rewind(s, 0);
  adopt(s, 0, 0, 0);
  streams_[s].next = 0;
}

void ReplayIndex::adopt(std::size_t s, std::uint64_t count, std::uint32_t size,
                        std::uint32_t phase) noexcept {
  streams_[s].count = count;
  streams_[s].phase = phase;
  resize(streams_[s], size);
}

void ReplayIndex::refresh() noexcept {
  if (priorities_) priorities_->settle();
  if (!stale_) return;
  Group& group = all_.groups[0];
  group.streams.clear();
  group.ends.clear();
  group.equal = 0;
  for (std::size_t s = 0; s < streams_.size(); ++s) add_to(group, s);
  stale_ = false;
}

std::size_t ReplayIndex::set_priorities(std::span<const std::int64_t> indices,
                                        std::span<const float> priorities) {
  if (!priorities_) refuse("priorities need a replay that was made with alpha");
  require_length("priorities", priorities.size(), indices.size(), "values");
  constexpr std::size_t kReplaced = SIZE_MAX;
  std::vector<std::size_t> cells(indices.size());
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const auto index = static_cast<std::uint64_t>(indices[i]);
    const std::uint64_t sequence = index / streams_.size();
    const auto s = static_cast<std::size_t>(index % streams_.size());
    const Stream& stream = streams_[s];
    if (indices[i] < 0 || sequence >= stream.count) {
      throw std::out_of_range("index " + to_string(indices[i]) + " is of no transition that was added");
    }
    priorities_->require(priorities[i]);
    cells[i] = kReplaced;
    if (stream.count - sequence > stream.size) continue;
    cells[i] = first_cell(s) + stream.back_of(stream.back(sequence));
    priorities_->prefetch(cells[i]);
  }
  std::size_t set = 0;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    if (cells[i] == kReplaced) continue;
    priorities_->set(cells[i], priorities[i]);
    ++set;
  }
  priorities_->settle();
  return set;
}

void ReplayIndex::restore_priorities(std::span<const std::uint32_t> sizes,
                                     std::span<const float> priorities) noexcept {
  priorities_->clear(priorities.empty() ? 1.0f : priorities[0]);
  std::size_t end = 1;  // of the stream's
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    end += sizes[s];
    for (std::uint32_t back = streams_[s].size; back-- > 0;) {
      const std::size_t cell = first_cell(s) + streams_[s].back_of(back);
      priorities_->set(cell, priorities.empty() ? 1.0f : priorities[end - 1 - back]);
    }
  }
  priorities_->settle();
}

void ReplayIndex::require_request(const Request& request, std::size_t batch_size) const {
  const auto require_stored = [batch_size](std::size_t stored, const std::string& where) {
    if (batch_size <= stored) return;
    refuse("batch_size " + to_string(batch_size) + " exceeds the " + to_string(stored) +
           " transitions stored" + where + "; collect more or lower batch_size");
  };
  if (batch_size < 1 || batch_size > kLargestBatch) {
    refuse("batch_size must lie in 1.." + to_string(kLargestBatch) + ", got " + to_string(batch_size));
  }
  const auto& weights = request.weights;
  const std::size_t listed = request.tasks.empty() ? tasks() : request.tasks.size();
  if (!weights.empty() && weights.size() != listed) {
    refuse("weights must hold one share for each of " + to_string(listed) + " tasks, got " +
           to_string(weights.size()));
  }
  if (request.beta && !priorities_) {
    refuse("beta draws by priority, which needs a replay that was made with alpha");
  }
  std::vector<bool> seen(tasks());
  std::size_t stored = 0;
  for (std::size_t t = 0; t < listed; ++t) {
    const std::int64_t task = request.tasks.empty() ? static_cast<std::int64_t>(t) : request.tasks[t];
    if (task < 0 || static_cast<std::size_t>(task) >= tasks()) {
      refuse("tasks must lie in 0.." + to_string(tasks() - 1) + ", got " + to_string(task));
    }
    if (seen[static_cast<std::size_t>(task)]) refuse("tasks must differ, got " + to_string(task) + " twice");
    seen[static_cast<std::size_t>(task)] = true;
    stored += sizes_[static_cast<std::size_t>(task)];
    if (!weights.empty() && weights[t] > 0.0 && sizes_[static_cast<std::size_t>(task)] == 0) {
      refuse("task " + to_string(task) + " has weight " + to_string(weights[t]) +
             " and no transition stored; collect some or give it weight 0");
    }
  }
  require_stored(stored, request.tasks.empty() ? "" : " of the tasks named");
  if (request.beta && priorities_->none()) {
    refuse("every priority is zero, and such transitions are never drawn: set some, or draw without beta");
  }
}

const Strata& ReplayIndex::strata(const Request& request, Strata& scratch) const {
  if (request.tasks.empty() && request.weights.empty()) return all_;
  const bool weighted = !request.weights.empty();
  std::vector<std::size_t> group_of(tasks(), SIZE_MAX);
  double sum = 0.0;
  for (std::size_t t = 0; t < std::max(request.tasks.size(), request.weights.size()); ++t) {
    if (weighted && request.weights[t] == 0.0) continue;
    if (weighted || scratch.groups.empty()) {
      scratch.groups.emplace_back();
      scratch.shares.push_back(sum += weighted ? request.weights[t] : 1.0);
    }
    group_of[request.tasks.empty() ? t : static_cast<std::size_t>(request.tasks[t])] =
        scratch.groups.size() - 1;
  }
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    const std::size_t group = group_of[static_cast<std::size_t>(streams_[s].task)];
    if (group != SIZE_MAX) add_to(scratch.groups[group], s);
  }
  return scratch;
}

void ReplayIndex::draw(const Request& request, const Strata& strata, std::uint64_t draw, std::size_t count,
                       std::size_t first, std::span<Pick> picks) const noexcept {
  if (!request.beta) {
    Picker(*this, strata, draw, count, first).fill(picks);
    return;
  }
  std::array<std::uint32_t, 256> cells;
  for (std::size_t begin = 0; begin < picks.size(); begin += cells.size()) {
    const std::span<Pick> part = picks.subspan(begin, std::min(cells.size(), picks.size() - begin));
    priorities_->draw(seed, draw, first + begin, std::span(cells).first(part.size()));
    for (std::size_t i = 0; i < part.size(); ++i) {
      const auto [s, cell] = cells_.at(cells[i]);
      part[i] = streams_[s].pick(s, streams_[s].back_of(cell));
    }
  }
}

void ReplayIndex::shares(std::span<const Pick> picks, std::span<double> out) const noexcept {
  for (std::size_t i = 0; i < picks.size(); ++i) {
    const Stream& stream = streams_[picks[i].stream];
    out[i] = priorities_->share(first_cell(picks[i].stream) + stream.back_of(stream.back(picks[i].sequence)));
  }
}

Picker::Picker(const ReplayIndex& index, const Strata& strata, std::uint64_t draw, std::size_t count,
               std::size_t first) noexcept
    : index_(index),
      strata_(strata),
      seed_(index.seed),
      draw_(draw),
      count_(count),
      offset_(draw_words(index.seed, draw, kShareQuad, 0)[0] / 4294967296.0),
      i_(first) {
  begin_group();
}

void Picker::begin_group() noexcept {
  bounded_ = BoundedDraw(strata_.groups[group_].ends.back());
  end_ = count_;
  if (group_ + 1 == strata_.groups.size()) return;
  const double share = strata_.shares[group_] / strata_.shares.back();
  const double first_after = std::ceil(share * static_cast<double>(count_) - offset_);
  end_ = std::min(end_, static_cast<std::size_t>(std::max(first_after, 0.0)));
}

void Picker::fill(std::span<Pick> picks) noexcept {
  const Stream* const streams = index_.streams().data();
  std::array<std::array<std::uint32_t, 4>, kQuads> words;
  std::uint32_t first = 0;  // quad of the words
  std::size_t drawn = 0;    // the element after the last whose word is among them
  for (std::size_t i = 0; i < picks.size();) {
    while (i_ >= end_) {
      ++group_;
      begin_group();
    }
    const Group& group = strata_.groups[group_];
    for (; i < picks.size() && i_ < end_; ++i, ++i_) {
      const auto element = static_cast<std::uint32_t>(i_);
      const std::uint32_t quad = element / 4;
      if (i_ >= drawn) {
        draw_quads(seed_, draw_, quad, words);
        first = quad;
        drawn = 4 * (std::size_t{quad} + kQuads);
      }
      std::uint32_t word = words[quad - first][element % 4];
      for (std::uint32_t attempt = 0;; word = draw_words(seed_, draw_, quad, ++attempt)[element % 4]) {
        std::uint32_t k = 0;
        if (!bounded_(word, k)) continue;
        const auto [s, cell] = group.at(k);
        const std::uint32_t back = streams[s].back_of(cell);
        if (back >= streams[s].size) continue;
        picks[i] = streams[s].pick(s, back);
        break;
      }
    }
  }
}

Window ReplayIndex::window(const Pick& pick, std::size_t n_step) const noexcept {
  const Stream& stream = streams_[pick.stream];
  std::uint32_t back = stream.back(pick.sequence);
  std::uint32_t pos = stream.position(back);
  Window window{stream.first_row + pos, pos, 1, pos, 0, false, false};
  std::uint32_t word = links_.get(window.row);
  while (window.steps < n_step && (word & kSlot) == 0 && back > 0) {
    --back;
    ++window.steps;
    window.last = stream.after(window.last);
    word = links_.get(stream.first_row + window.last);
  }
  const std::uint32_t slot = word & kSlot;
  window.successor = slot != 0 ? -static_cast<std::int64_t>(slot)
                               : static_cast<std::int64_t>(stream.first_row + stream.after(window.last));
  window.terminated = (word & kTerminated) != 0;
  window.truncated = (word & kTruncated) != 0;
  return window;
}

void ReplayIndex::frames(const Stream& stream, std::uint32_t position, std::uint32_t back,
                         std::span<std::uint32_t> out) const noexcept {
  for (std::size_t f = out.size(); f-- > 0;) {
    out[f] = position;
    if (f == 0 || back + 1 >= stream.kept) continue;  // the oldest row kept begins an episode
    const std::uint32_t before = position == 0 ? stream.ring - 1 : position - 1;
    if ((links_.get(stream.first_row + before) & kSlot) != 0) continue;
    position = before;
    ++back;
  }
}

}  // namespace brc
