// The index of a replay store whose rows lie elsewhere, for example on a GPU.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "replay_index.hpp"

namespace brc {

/// Where the parts of B sampled transitions are. A place is a row, or -1 - slot of the side store.
struct PlanColumns {
  std::span<std::int64_t> steps;         // [B, n_step] rows of the steps summed, -1 where there is none
  std::span<std::int64_t> observations;  // [B, stack] rows
  std::span<std::int64_t> successors;    // [B, stack] places
  std::span<float> masks;                // [B]
  std::span<std::int64_t> task_ids;      // [B]
  std::span<unsigned char> terminated;   // [B]
  std::span<unsigned char> truncated;    // [B]
  std::span<std::int64_t> summed;        // [B] how many steps
  std::span<std::int64_t> indices;       // [B]
  std::span<float> weights;              // [B] for draws by priority, else none
};

/// A ReplayIndex with its own links and a lock; its draws are those of a ReplayStore with equal arguments and
/// calls. Its caller keeps the rows.
class DeviceIndex {
 public:
  DeviceIndex(std::span<const std::int64_t> capacities, std::span<const std::int64_t> task_ids,
              std::int64_t stack, std::uint64_t seed, std::optional<double> alpha = std::nullopt)
      : index_(capacities, task_ids, stack, seed, alpha),
        links_(index_.rows()),
        stack_(static_cast<std::size_t>(stack)) {
    bind();
  }

  /// The rows [M] with which the next observations of the streams must be compared, -1 where there is none.
  /// Refuses unknown and repeated streams.
  void heads(std::span<const std::int64_t> ids, std::span<std::int64_t> rows) {
    const std::lock_guard lock(mutex_);
    require_length("rows", rows.size(), ids.size(), "values");
    index_.require_streams(ids);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto s = static_cast<std::size_t>(ids[i]);
      rows[i] = index_.streams()[s].head_valid ? static_cast<std::int64_t>(index_.head_row(s)) : -1;
    }
  }

  /// Appends one transition to each stream: `rows` [M] says where it goes, `moved` [M] the side slot for what
  /// the row's observation holds now (or -1), `successors` [M] the place of the successor. Precondition:
  /// heads() was called with the same streams, and `departs` tells which differed.
  void add(std::span<const std::int64_t> ids, std::span<const unsigned char> departs,
           std::span<const unsigned char> terminated, std::span<const unsigned char> truncated,
           std::span<std::int64_t> rows, std::span<std::int64_t> moved, std::span<std::int64_t> successors) {
    const std::lock_guard lock(mutex_);
    for (const std::size_t length : {departs.size(), terminated.size(), truncated.size(), rows.size(),
                                     moved.size(), successors.size()}) {
      require_length("each column", length, ids.size(), "values");
    }
    index_.require_streams(ids);
    index_.reserve_slots(2 * ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto s = static_cast<std::size_t>(ids[i]);
      const bool departed = index_.streams()[s].head_valid && departs[i] != 0;
      const Placement place = index_.append(s, departed, terminated[i] != 0, truncated[i] != 0);
      index_.set_link(place.row, place.link);
      rows[i] = static_cast<std::int64_t>(place.row);
      moved[i] = place.moved;
      successors[i] = place.successor;
    }
    index_.refresh();
  }

  /// Plans U batches and advances draws() by U.
  void plan(const Request& request, std::size_t num_batches, std::size_t batch_size, const PlanColumns& out) {
    const std::lock_guard lock(mutex_);
    require_plan(request, num_batches * batch_size, out);
    require_length("weights", out.weights.size(), request.beta ? num_batches * batch_size : 0, "values");
    index_.require_request(request, batch_size);
    Strata scratch;
    const Strata& strata = index_.strata(request, scratch);
    std::vector<Pick> picks(batch_size);
    std::vector<double> shares(request.beta ? batch_size : 0);
    for (std::size_t u = 0; u < num_batches; ++u, ++draws_) {
      index_.draw(request, strata, draws_, batch_size, 0, picks);
      plan_all(picks, request, u * batch_size, out);
      if (!request.beta) continue;
      index_.shares(picks, shares);
      weigh(shares, *request.beta, out.weights.subspan(u * batch_size, batch_size));
    }
  }
  /// Plans the transitions of these names; throws std::out_of_range where one is not stored.
  void plan_named(const Request& request, std::span<const std::int64_t> names, const PlanColumns& out) {
    const std::lock_guard lock(mutex_);
    require_plan(request, names.size(), out);
    std::vector<Pick> picks;
    for (const std::int64_t name : names) picks.push_back(index_.find(name));
    plan_all(picks, request, 0, out);
  }
  [[nodiscard]] std::vector<std::int64_t> indices() const {
    const std::lock_guard lock(mutex_);
    return index_.indices();
  }
  [[nodiscard]] Sequences sequences(std::size_t batch_size, std::size_t length) {
    const std::lock_guard lock(mutex_);
    Sequences made = index_.sequences(draws_, batch_size, length);
    ++draws_;
    return made;
  }
  [[nodiscard]] Jumps jumps() const {
    const std::lock_guard lock(mutex_);
    return index_.jumps();
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    index_.clear();
  }
  std::size_t discard_episode(std::int64_t stream) {
    const std::lock_guard lock(mutex_);
    const std::size_t taken = index_.discard_episode(index_.require_stream(stream));
    index_.refresh();
    return taken;
  }
  /// Lets the heads of streams go: `moved` [M] says to which side slot what the rows `heads` name must be
  /// moved.
  void reset(std::span<const std::int64_t> ids, std::span<std::int64_t> moved) {
    const std::lock_guard lock(mutex_);
    require_length("moved", moved.size(), ids.size(), "values");
    index_.require_streams(ids);
    index_.reserve_slots(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) moved[i] = index_.leave(static_cast<std::size_t>(ids[i]));
  }

  /// As ReplayIndex::set_priorities.
  std::size_t set_priorities(std::span<const std::int64_t> indices, std::span<const float> priorities) {
    const std::lock_guard lock(mutex_);
    return index_.set_priorities(indices, priorities);
  }

  void adopt(const ReplayIndex& index, std::uint64_t draws, std::span<const std::uint32_t> links) {
    const std::lock_guard lock(mutex_);
    require_length("links", links.size(), links_.size(), "values");
    index_ = index;
    links_.assign(links.begin(), links.end());
    bind();
    draws_ = draws;
  }
  [[nodiscard]] const ReplayIndex& index() const noexcept { return index_; }
  [[nodiscard]] std::uint64_t draws() const {
    const std::lock_guard lock(mutex_);
    return draws_;
  }

 private:
  void bind() { index_.bind({reinterpret_cast<std::byte*>(links_.data()), sizeof(std::uint32_t)}); }
  void require_plan(const Request& request, std::size_t total, const PlanColumns& out) const {
    require_length("steps", out.steps.size(), total * request.powers.size(), "values");
    require_length("observations", out.observations.size(), total * stack_, "values");
    require_length("successors", out.successors.size(), total * stack_, "values");
    require_length("masks", out.masks.size(), total, "values");
    for (const std::size_t length : {out.task_ids.size(), out.terminated.size(), out.truncated.size(),
                                     out.summed.size(), out.indices.size()}) {
      require_length("each column", length, total, "values");
    }
  }
  void plan_all(std::span<const Pick> picks, const Request& request, std::size_t first,
                const PlanColumns& out) const {
    std::vector<std::uint32_t> positions(stack_);
    for (std::size_t i = 0; i < picks.size(); ++i) plan_one(picks[i], request, first + i, positions, out);
  }
  void plan_one(const Pick& pick, const Request& request, std::size_t i, std::span<std::uint32_t> positions,
                const PlanColumns& out) const noexcept {
    const std::size_t n_step = request.powers.size();
    const Stream& stream = index_.streams()[pick.stream];
    const Window window = index_.window(pick, n_step);
    std::uint32_t pos = window.position;
    for (std::size_t step = 0; step < n_step; ++step) {
      const bool summed = step < window.steps;
      out.steps[i * n_step + step] = summed ? static_cast<std::int64_t>(stream.first_row + pos) : -1;
      if (summed) pos = stream.after(pos);
    }
    const std::uint32_t back = stream.back(pick.sequence);
    const auto put = [&](std::uint32_t position, std::uint32_t distance, std::size_t count,
                         std::span<std::int64_t> to) {
      index_.frames(stream, position, distance, positions.first(count));
      for (std::size_t f = 0; f < count; ++f) {
        to[i * stack_ + f] = static_cast<std::int64_t>(stream.first_row + positions[f]);
      }
    };
    put(window.position, back, stack_, out.observations);
    put(window.last, back - (window.steps - 1), stack_ - 1, out.successors);
    out.successors[i * stack_ + stack_ - 1] = window.successor;
    out.masks[i] = window.terminated ? 0.0f : request.powers[window.steps - 1];
    out.task_ids[i] = stream.task;
    out.terminated[i] = window.terminated;
    out.truncated[i] = window.truncated;
    out.summed[i] = window.steps;
    out.indices[i] = index_.index_of(pick);
  }

  mutable std::mutex mutex_;  // guards every field below
  ReplayIndex index_;
  std::vector<std::uint32_t> links_;  // [rows]
  std::uint64_t draws_ = 0;
  const std::size_t stack_;
};

}  // namespace brc
