// Saving and restoring the content of a ReplayStore.
#include "replay_checks.hpp"
#include "replay_store.hpp"

namespace brc {

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

}  // namespace brc
