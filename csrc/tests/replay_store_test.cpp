// ReplayStore against a list of transitions, for a build with sanitizers:
//   cmake -B build -DBRC_FAST_BUILD_TESTS=ON -DBRC_FAST_SANITIZE=address,undefined; ctest --test-dir build
#include "replay_store.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "philox.hpp"

namespace {

using Block = std::array<std::uint32_t, 4>;
static_assert(brc::philox4x32({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(brc::philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
              Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(brc::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

constexpr std::size_t O = 3;
constexpr std::size_t A = 2;

void check(bool holds, const char* rule) {
  if (!holds) throw std::logic_error(rule);
}

template <class Exception, class Call>
void check_throws(const Call& call, const char* rule) {
  try {
    call();
  } catch (const Exception&) {
    return;
  }
  throw std::logic_error(rule);
}

struct Rows {
  explicit Rows(std::size_t count)
      : observations(count * O),
        actions(count * A),
        rewards(count),
        terminated(count),
        truncated(count),
        successors(count * O) {}
  [[nodiscard]] brc::TransitionColumns<true> columns() const {
    return {observations, actions, rewards, terminated, truncated, successors};
  }
  std::vector<float> observations, actions, rewards;
  std::vector<unsigned char> terminated, truncated;
  std::vector<float> successors;
};

struct Sampled {
  explicit Sampled(std::size_t count)
      : observations(count * O),
        actions(count * A),
        rewards(count),
        masks(count),
        next_observations(count * O),
        task_ids(count) {}
  [[nodiscard]] brc::BatchColumns columns() {
    return {observations, actions, rewards, masks, next_observations, task_ids};
  }
  std::vector<float> observations, actions, rewards, masks, next_observations;
  std::vector<std::int64_t> task_ids;
};

struct Saved {
  Saved(std::size_t streams, std::size_t rows, std::size_t side_rows)
      : sizes(streams), rows(rows), has_successor(rows), heads(streams * O), head_valid(streams) {
    this->rows.successors.resize(side_rows * O);
  }
  std::vector<std::int64_t> sizes;
  Rows rows;
  std::vector<unsigned char> has_successor;
  std::vector<float> heads;
  std::vector<unsigned char> head_valid;
};

/// Moves the content of `from` to `to` by way of its saved state.
void restore(const brc::ReplayStore& from, brc::ReplayStore& to, std::size_t streams) {
  Saved saved(streams, from.size(), from.side_size());
  from.save({saved.sizes,
             {saved.rows.observations, saved.rows.actions, saved.rows.rewards, saved.rows.terminated,
              saved.rows.truncated, saved.rows.successors},
             saved.has_successor,
             saved.heads,
             saved.head_valid});
  to.load({saved.sizes, saved.rows.columns(), saved.has_successor, saved.heads, saved.head_valid},
          from.seed(), from.draws());
}

struct Kept {
  float observation, successor;
  bool terminated;
};

/// Random adds, ends, jumps and restores; after each, every stored transition is compared.
void matches_a_list(std::int64_t capacity, const std::vector<std::int64_t>& task_ids, std::uint64_t seed) {
  const std::size_t N = task_ids.size();
  brc::ReplayStore stores[] = {{capacity, O, A, task_ids, seed}, {capacity, O, A, task_ids, seed + 1}};
  brc::ReplayStore* store = &stores[0];
  std::vector<std::deque<Kept>> kept(N);
  const auto capacities = store->capacities();
  float tag = 0;
  std::uint32_t draws = 0;
  const auto chance = [&](std::uint32_t bound) { return brc::bounded_draw(seed, 0, draws++, bound); };
  for (int step = 0; step < 150; ++step) {
    std::vector<std::int64_t> streams;
    for (std::size_t s = 0; s < N; ++s) {
      if (chance(3) != 0) streams.push_back(static_cast<std::int64_t>(s));
    }
    Rows rows(streams.size());
    for (std::size_t i = 0; i < streams.size(); ++i) {
      auto& list = kept[static_cast<std::size_t>(streams[i])];
      const float observation = list.empty() || chance(4) == 0 ? ++tag : list.back().successor;
      list.push_back({observation, ++tag, chance(5) == 0});
      if (list.size() > static_cast<std::size_t>(capacities[static_cast<std::size_t>(streams[i])]))
        list.pop_front();
      std::fill_n(rows.observations.data() + i * O, O, observation);
      std::fill_n(rows.actions.data() + i * A, A, -observation);
      rows.rewards[i] = observation;
      rows.terminated[i] = list.back().terminated;
      rows.truncated[i] = chance(5) == 0;
      std::fill_n(rows.successors.data() + i * O, O, tag);
    }
    store->add(streams, rows.columns());
    if (chance(10) == 0) {
      brc::ReplayStore* other = store == &stores[0] ? &stores[1] : &stores[0];
      restore(*store, *other, N);
      store = other;
    }
    Sampled one(1);
    std::size_t total = 0;
    for (std::size_t s = 0; s < N; ++s) {
      total += kept[s].size();
      for (std::size_t age = 0; age < kept[s].size(); ++age) {
        store->read(static_cast<std::int64_t>(s), static_cast<std::int64_t>(age), one.columns());
        const Kept& expected = kept[s][age];
        check(one.observations == std::vector<float>(O, expected.observation), "observations are kept");
        check(one.actions == std::vector<float>(A, -expected.observation), "actions are kept");
        check(one.rewards[0] == expected.observation, "rewards are kept");
        check(one.next_observations == std::vector<float>(O, expected.successor), "successors are kept");
        check(one.masks[0] == (expected.terminated ? 0.0f : 1.0f), "masks are kept");
        check(one.task_ids[0] == task_ids[s], "tasks are kept");
      }
    }
    check(store->size() == total, "sizes are kept");
    if (total == 0) continue;
    Sampled batches(2 * 33);
    store->sample(2, 33, batches.columns());
  }
}

void grows_past_one_block_of_side_slots() {
  const std::int64_t capacity = 60'000;
  brc::ReplayStore store(capacity, O, A, std::vector<std::int64_t>{0}, 0);
  Rows row(1);
  row.terminated[0] = 1;
  const std::vector<std::int64_t> streams{0};
  for (int step = 0; step < 2 * capacity; ++step) {
    std::fill(row.successors.begin(), row.successors.end(), static_cast<float>(step));
    store.add(streams, row.columns());
  }
  Sampled one(1);
  for (std::int64_t age = 0; age < capacity; age += 997) {
    store.read(0, age, one.columns());
    check(one.next_observations[0] == static_cast<float>(capacity + age), "successors in any block are kept");
  }
  check(store.side_size() == static_cast<std::size_t>(capacity), "freed slots are used again");
}

void refuses_and_stays_as_it_was() {
  const std::vector<std::int64_t> tasks{0, 1};
  brc::ReplayStore store(4, O, A, tasks, 0);
  Sampled batch(2);
  using Invalid = std::invalid_argument;
  check_throws<Invalid>([&] { store.sample(1, 2, batch.columns()); }, "an empty store is refused");
  Rows rows(2);
  const auto add = [&](std::vector<std::int64_t> streams) { store.add(streams, rows.columns()); };
  add({0, 1});
  check_throws<Invalid>([&] { add({1, 1}); }, "a stream named twice is refused");
  check_throws<Invalid>([&] { add({0, 2}); }, "an unknown stream is refused");
  check_throws<Invalid>([&] { add({0}); }, "another length is refused");
  rows.successors.back() = std::numeric_limits<float>::quiet_NaN();
  check_throws<Invalid>([&] { add({0, 1}); }, "a value that is not finite is refused");
  check_throws<Invalid>([&] { store.sample(1, 3, batch.columns()); }, "short columns are refused");
  check_throws<std::out_of_range>([&] { store.read(0, 1, Sampled(1).columns()); },
                                  "an unknown age is refused");
  check(store.size() == 2 && store.draws() == 0, "a refusal changes nothing");
  check_throws<Invalid>([&] { brc::ReplayStore(0, O, A, tasks, 0); }, "capacity 0 is refused");
}

void serves_several_threads() {
  const std::vector<std::int64_t> tasks(8, 0);
  std::vector<std::int64_t> streams(8);
  std::iota(streams.begin(), streams.end(), 0);
  brc::ReplayStore store(64, O, A, tasks, 0);
  store.add(streams, Rows(8).columns());
  std::jthread writer([&] {
    for (int step = 0; step < 500; ++step) store.add(streams, Rows(8).columns());
  });
  Sampled batch(32);
  for (int step = 0; step < 500; ++step) store.sample(2, 16, batch.columns());
  check(store.draws() == 1000, "each batch counts once");
}

}  // namespace

int main() {
  try {
    for (const std::int64_t capacity : {1, 2, 3, 8}) {
      for (std::uint64_t seed = 0; seed < 5; ++seed) {
        matches_a_list(capacity, {0}, seed);
        matches_a_list(capacity, {1, 0, 1, 0, 2}, seed);
      }
    }
    grows_past_one_block_of_side_slots();
    refuses_and_stays_as_it_was();
    serves_several_threads();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
  std::puts("passed");
}
