// One writer, four samplers, of whom two set priorities, and a saver at work on one ReplayStore, for builds
// with sanitizers (make sanitize). Every transition can be checked by itself, since all of it follows from
// the number in its observation.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <future>
#include <memory>
#include <thread>

#include "replay_oracle.hpp"

namespace brc::test {
namespace {

constexpr std::size_t kComponents = 5;
constexpr std::size_t kStack = 2;
constexpr double kDiscount = 0.5;        // so that every power is exact
constexpr std::size_t kAdds = 400'000;   // at most
constexpr std::size_t kSamples = 1'000;  // of each sampler
constexpr std::size_t kSaves = 30;
constexpr std::uint32_t kEpisode = 16;  // numbers of an episode, some of which are not reached
// Between the numbers of two streams; a float holds them all, and all streams have the same episodes.
constexpr std::uint32_t kApart = kEpisode * 13 * 3 * 3'800;

const Ids kTasks{0, 1, 0, 2, 1, 0, 1};  // of the streams
const Ids kCapacities{90, 50, 7};

/// Episode b begins at number 16 b and takes `length` actions, each of which leads to the following number.
/// It is terminated, truncated, or left without a word, in turn.
constexpr std::uint32_t length(std::uint32_t number) {
  return 1 + number / kEpisode * 7 % 13;
}
constexpr bool last(std::uint32_t number) {
  return number % kEpisode + 1 == length(number);
}
constexpr bool terminated(std::uint32_t number) {
  return last(number) && number / kEpisode % 3 == 0;
}
constexpr bool truncated(std::uint32_t number) {
  return last(number) && number / kEpisode % 3 == 1;
}
constexpr std::uint32_t following(std::uint32_t number) {
  return last(number) ? (number / kEpisode + 1) * kEpisode : number + 1;
}

Layout make_layout() {
  return {
      {"observation", kComponents * sizeof(float), sizeof(float), Kind::float32},
      {{"action", sizeof(std::int64_t), sizeof(std::int64_t), Kind::integer}, {"extra", 3, 1, Kind::integer}},
      kStack};
}

/// Number of the transitions of the first stream, in order.
std::vector<std::uint32_t> make_numbers() {
  std::vector<std::uint32_t> numbers{0};
  while (numbers.size() < kAdds) numbers.push_back(following(numbers.back()));
  check(numbers.back() + kEpisode < kApart, "streams have numbers of their own");
  return numbers;
}

const Layout kLayout = make_layout();
const std::vector<std::uint32_t> kNumbers = make_numbers();

std::uint32_t number_of(std::size_t stream, std::uint64_t sequence) {
  return static_cast<std::uint32_t>(stream) * kApart + kNumbers[sequence];
}

void put_observation(Values& column, std::size_t i, std::uint32_t number) {
  const std::vector<float> frame(kComponents, static_cast<float>(number));
  std::memcpy(&column[i * sizeof(float) * kComponents], frame.data(), sizeof(float) * kComponents);
}

/// Column `i` of a frame, all of whose components must be equal.
std::uint32_t observation_at(const Values& column, std::size_t i) {
  std::array<float, kComponents> frame;
  std::memcpy(frame.data(), &column[i * sizeof(frame)], sizeof(frame));
  for (const float component : frame) check(component == frame[0], "an observation is never torn");
  return static_cast<std::uint32_t>(frame[0]);
}

void put_transition(Rows& rows, std::size_t i, std::size_t stream, std::uint64_t sequence) {
  const std::uint32_t number = number_of(stream, sequence);
  put_observation(rows.observations[0], i, number);
  std::memcpy(&rows.fields[0][i * sizeof(std::int64_t)], &kTasks[stream], sizeof(std::int64_t));
  std::memset(&rows.fields[1][i * 3], static_cast<int>(number % 251), 3);
  rows.rewards[i] = static_cast<float>(number);
  rows.terminated[i] = terminated(number);
  rows.truncated[i] = truncated(number);
  put_observation(rows.successors[0], i, number + 1);
}

/// Checks row `i` of a batch and returns its number.
std::uint32_t check_transition(const Batch& batch, std::size_t i, const Request& request) {
  const std::size_t newest = (i + 1) * kStack - 1;
  const std::uint32_t number = observation_at(batch.observations[0], newest);
  const std::uint32_t before = number % kEpisode == 0 ? number : number - 1;
  check(observation_at(batch.observations[0], newest - 1) == before, "older frames belong to the episode");
  const std::uint32_t steps = observation_at(batch.next_observations[0], newest) - number;
  check(number % kEpisode + steps <= length(number), "no step leads out of an episode");
  check(steps >= 1 && steps <= request.powers.size(), "as many steps are summed as were asked for, or fewer");
  check(observation_at(batch.next_observations[0], newest - 1) == number + steps - 1,
        "frames follow each other");

  float reward = static_cast<float>(number);
  for (std::uint32_t step = 1; step < steps; ++step) {
    reward += request.powers[step] * static_cast<float>(number + step);
  }
  check(batch.rewards[i] == reward, "rewards are those of the steps");
  const float mask = terminated(number + steps - 1) ? 0.0f : request.powers[steps - 1];
  check(batch.masks[i] == mask, "the mask is that of the last step");
  check((batch.terminated[i] != 0) == terminated(number + steps - 1) &&
            (batch.truncated[i] != 0) == truncated(number + steps - 1),
        "ends are those of the last step");
  check(batch.steps[i] == steps, "as many steps are told as were summed");
  const std::size_t stream = number / kApart;
  check(batch.indices[i] % static_cast<std::int64_t>(kTasks.size()) == static_cast<std::int64_t>(stream) &&
            number_of(stream, static_cast<std::uint64_t>(batch.indices[i]) / kTasks.size()) == number,
        "a transition has its own name");

  std::int64_t action;
  std::memcpy(&action, &batch.fields[0][i * sizeof(action)], sizeof(action));
  check(batch.task_ids[i] == kTasks[number / kApart] && action == batch.task_ids[i],
        "tasks are not mixed up");
  for (std::size_t k = 0; k < 3; ++k) {
    check(batch.fields[1][3 * i + k] == static_cast<std::byte>(number % 251), "extras stay with their row");
  }
  return number;
}

/// A store, who works on it, and what they count.
class Stress {
 public:
  Stress() : store_(kLayout, kCapacities, kTasks, 1, false, 0.6) {
    for (int step = 0; step < 40; ++step) add();
  }

  void run() {
    std::future<void> workers[] = {work(&Stress::sample), work(&Stress::sample_ahead),
                                   work(&Stress::sample_sequences), work(&Stress::sample_sequences),
                                   work(&Stress::save)};
    std::future<void> writer = std::async(std::launch::async, [this] {
      while (working_ > 0 && adds_ < kAdds) add();
    });
    for (auto& worker : workers) worker.get();
    writer.get();
    check(store_.draws() == 5 * kSamples, "each batch counts once");
    std::printf(
        "%zu adds beside %zu samples, of which %zu elements changed while they were ahead, and %zu saves\n",
        adds_, 2 * kSamples, changed_, kSaves);
  }

 private:
  std::future<void> work(void (Stress::*job)()) {
    ++working_;
    return std::async(std::launch::async, [this, job] {
      const std::unique_ptr<std::atomic<int>, void (*)(std::atomic<int>*)> end(
          &working_, [](std::atomic<int>* working) { --*working; });
      (this->*job)();
    });
  }

  /// One transition for all streams, or for some of them, or many for one.
  void add() {
    if (adds_ % 16 == 7) {
      const std::size_t s = adds_ / 16 % kTasks.size();
      Rows rows(kLayout, adds_ % 5 * 9);
      for (std::size_t i = 0; i < rows.rewards.size(); ++i) {
        put_transition(rows, i, s, counts_[s]++);
      }
      store_.extend(static_cast<std::int64_t>(s), rows.columns());
      ++adds_;
      return;
    }
    Ids ids;
    for (std::size_t s = 0; s < kTasks.size(); ++s) {
      if (adds_ % 4 != 0 || (adds_ / 4 + s) % 3 != 0) ids.push_back(static_cast<std::int64_t>(s));
    }
    Rows rows(kLayout, ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto s = static_cast<std::size_t>(ids[i]);
      put_transition(rows, i, s, counts_[s]++);
    }
    if (ids.size() == kTasks.size()) {
      store_.add(rows.columns());
    } else {
      store_.add(ids, rows.columns());
    }
    ++adds_;
  }

  static void check_batch(const Batch& batch, const Request& request) {
    for (std::size_t i = 0; i < batch.rewards.size(); ++i) (void)check_transition(batch, i, request);
  }

  void sample() {
    for (std::size_t k = 0; k < kSamples; ++k) {
      const Request& request = requests_[k % std::size(requests_)];
      Batch batch(kLayout, 24, request.beta.has_value());
      store_.sample(request, 1, 24, batch.columns());
      check_batch(batch, request);
      prioritize(batch);
    }
  }

  void sample_ahead() {
    Ahead ahead;
    for (std::size_t k = 0; k < kSamples; ++k) {
      const Request& request = requests_[k % std::size(requests_)];
      Batch batch(kLayout, 2 * 16, request.beta.has_value());
      store_.gather_ahead(request, store_.draws(), 2, 16, batch.columns(), ahead);
      check_batch(batch, request);
      if (k % 8 == 0) std::this_thread::yield();
      changed_ += store_.settle(request, 2, 16, batch.columns(), ahead);
      check_batch(batch, request);
      prioritize(batch);
    }
  }

  /// Some of them have been replaced since.
  void prioritize(const Batch& batch) {
    for (const float weight : batch.weights) check(weight > 0.0f && weight <= 1.0f, "weights are at most 1");
    if (batch.weights.empty()) return;
    check(store_.set_priorities(batch.indices, batch.weights) <= batch.indices.size(), "each is set once");
  }

  /// Reads by their names what is still there of sequences.
  void sample_sequences() {
    constexpr std::size_t kLength = 4;
    Batch batch(kLayout, 3 * kLength);
    for (std::size_t k = 0; k < kSamples; ++k) {
      const Sequences made = store_.sequences(3, kLength);
      try {
        store_.read(made.indices, requests_[0], batch.columns());
      } catch (const std::out_of_range&) {
        ++replaced_;
        continue;
      }
      check(batch.indices == made.indices, "transitions are those that were named");
      for (std::size_t i = 0; i < made.indices.size(); ++i) {
        const std::uint32_t number = check_transition(batch, i, requests_[0]);
        if (i % kLength == 0) continue;
        const std::uint32_t before = observation_at(batch.observations[0], i * kStack - 1);
        check(number == following(before), "a sequence is of transitions that followed each other");
        check((made.starts[i] != 0) == (number % kEpisode == 0), "a sequence tells where episodes begin");
      }
    }
  }

  void save() {
    ReplayStore same(kLayout, kCapacities, kTasks, 0, false, 0.6);
    ReplayStore smaller(kLayout, Ids{9, 50, 1}, kTasks, 0, false);
    ReplayStore larger(kLayout, Ids{90, 99, 70}, kTasks, 0, false);
    ReplayStore* const stores[] = {&same, &smaller, &larger};
    Saves saves;
    for (std::size_t k = 0; k < kSaves; ++k) {
      saves.write(store_, k % 5 == 0);
      ReplayStore& loaded = *stores[k % 3];
      saves.load(loaded, k);
      check_loaded(loaded, saves.content);
    }
  }

  void check_loaded(const ReplayStore& loaded, const Content& content) const {
    Batch one(kLayout, 1);
    const auto sizes = loaded.sizes(), capacities = loaded.capacities();
    for (std::size_t s = 0; s < kTasks.size(); ++s) {
      check(sizes[s] == std::min<std::int64_t>(content.size[s], capacities[s]), "a load keeps what fits");
      for (std::int64_t age = 0; age < sizes[s]; ++age) {
        const std::uint64_t sequence = content.count[s] - static_cast<std::uint64_t>(sizes[s] - age);
        const Ids name{static_cast<std::int64_t>(sequence * kTasks.size() + s)};
        loaded.read(name, requests_[0], one.columns());
        check(check_transition(one, 0, requests_[0]) == number_of(s, sequence), "a load keeps the order");
      }
    }
  }

  const Request requests_[4] = {{3, kDiscount, {}, {}},
                                {1, kDiscount, {2, 0}, {}},
                                {5, kDiscount, {}, {1, 0, 2}},
                                {2, kDiscount, {}, {}, 0.4}};
  ReplayStore store_;
  std::atomic<int> working_ = 0;
  std::size_t adds_ = 0;                                                           // of the writer
  std::vector<std::uint64_t> counts_ = std::vector<std::uint64_t>(kTasks.size());  // of the writer
  std::atomic<std::size_t> replaced_ = 0;                                          // of sequences
  std::size_t changed_ = 0;                                                        // of the sampler ahead
};

/// Two that draw at the same time get batches of different numbers.
void nobody_draws_what_another_has_drawn() {
  const Layout layout({"observation", 1, 1, Kind::integer}, {{"action", 1, 1, Kind::integer}}, 1);
  const Ids capacities{10'000}, task_ids{0};
  ReplayStore store(layout, capacities, task_ids, 0, false);
  store.extend(0, Rows(layout, 10'000).columns());
  const auto draw = [&store] {
    std::vector<Ids> drawn;
    for (std::size_t k = 0; k < kSamples; ++k) drawn.push_back(store.sequences(8, 2).indices);
    return drawn;
  };
  auto other = std::async(std::launch::async, draw);
  std::vector<Ids> drawn = draw();
  std::ranges::copy(other.get(), std::back_inserter(drawn));
  std::ranges::sort(drawn);
  check(std::ranges::adjacent_find(drawn) == drawn.end(), "no two batches of sequences are the same");
}

}  // namespace
}  // namespace brc::test

int main() {
  try {
    brc::test::nobody_draws_what_another_has_drawn();
    brc::test::Stress().run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
}
