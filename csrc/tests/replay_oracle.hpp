// What the tests of the replay store share: columns and files of their own, random values, and a list that
// does what a store must do, without any care for memory or time.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "philox.hpp"
#include "replay_store.hpp"

namespace brc::test {

using Values = std::vector<std::byte>;  // of one field, or of a column of it
using Ids = std::vector<std::int64_t>;

inline void check(bool holds, const std::string& rule) {
  if (!holds) throw std::logic_error(rule);
}

/// The call must throw, and say so with these words.
template <class Exception = std::invalid_argument, class Call>
void check_refuses(const Call& call, const std::string& words) {
  try {
    call();
  } catch (const Exception& error) {
    const std::string message = error.what();
    check(message.find(words) != std::string::npos, "\"" + words + "\" is missing in: " + message);
    return;
  }
  throw std::logic_error("not refused: " + words);
}

inline void put(Values& column, std::size_t index, const Values& value) {
  std::ranges::copy(value, column.begin() + static_cast<std::ptrdiff_t>(index * value.size()));
}

/// M transitions to add. Each column is as long as it must be: a sanitizer sees whoever reads further.
struct Rows {
  Rows(const Layout& layout, std::size_t count)
      : observations(count * layout.observation.bytes),
        rewards(count),
        terminated(count),
        truncated(count),
        successors(observations.size()) {
    for (const Field& field : layout.fields) fields.emplace_back(count * field.bytes);
  }
  [[nodiscard]] TransitionColumns columns() const {
    TransitionColumns columns{{observations}, {}, rewards, terminated, truncated, {successors}};
    std::ranges::copy(fields, columns.fields.begin());
    return columns;
  }
  Values observations;
  std::vector<Values> fields;
  std::vector<float> rewards;
  std::vector<unsigned char> terminated, truncated;
  Values successors;
};

/// B sampled transitions.
struct Batch {
  Batch(const Layout& layout, std::size_t count, bool weighted = false)
      : observations(count * layout.stack * layout.observation.bytes),
        rewards(count),
        masks(count),
        next_observations(observations.size()),
        task_ids(count),
        terminated(count),
        truncated(count),
        steps(count),
        indices(count),
        weights(weighted ? count : 0) {
    for (const Field& field : layout.fields) fields.emplace_back(count * field.bytes);
  }
  [[nodiscard]] BatchColumns columns() {
    BatchColumns columns{{observations}, {},    rewards, masks,  {next_observations}, task_ids, terminated,
                         truncated,      steps, indices, weights};
    std::ranges::copy(fields, columns.fields.begin());
    return columns;
  }
  bool operator==(const Batch&) const = default;
  Values observations;
  std::vector<Values> fields;
  std::vector<float> rewards, masks;
  Values next_observations;
  Ids task_ids;
  std::vector<unsigned char> terminated, truncated;
  Ids steps, indices;
  std::vector<float> weights;
};

/// A file without a name, gone when it is closed.
class File {
 public:
  File() {
    std::string path = "/tmp/replay-test-XXXXXX";
    number_ = ::mkstemp(path.data());
    check(number_ >= 0 && ::unlink(path.c_str()) == 0, "a temporary file can be made");
  }
  File(File&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~File() {
    if (number_ >= 0) ::close(number_);
  }
  [[nodiscard]] int number() const noexcept { return number_; }

 private:
  int number_;
};

/// The segments of a saved store, as its caller keeps them.
struct Saves {
  /// Writes all rows, or those since the last call; the newest of the last call is written once more.
  void write(const ReplayStore& store, bool all) {
    std::vector<std::uint64_t> from(store.num_streams());
    if (all || segments.empty()) {
      segments.clear();
      files.clear();
    } else {
      std::ranges::transform(content.count, from.begin(),
                             [](auto count) { return count == 0 ? 0 : count - 1; });
    }
    files.emplace_back();
    Snapshot snapshot = store.write_segment(files.back().number(), from);
    content = std::move(snapshot.content);
    segments.push_back({files.back().number(), std::move(snapshot.table), "segment"});
  }
  void load(ReplayStore& store, std::uint64_t seed) const { store.load(content, segments, seed); }
  std::vector<File> files;
  std::vector<SegmentFile> segments;
  Content content;
};

/// Random numbers, fields and requests.
class Random {
 public:
  explicit Random(std::uint64_t seed) : seed_(seed) {}
  [[nodiscard]] std::uint32_t below(std::uint32_t bound) {
    return philox4x32({next_++, 0, 0, 0}, {static_cast<std::uint32_t>(seed_), 1})[0] % bound;
  }
  [[nodiscard]] bool one_in(std::uint32_t times) { return below(times) == 0; }
  template <std::size_t count>
  [[nodiscard]] auto of(const int (&values)[count]) {
    return values[below(count)];
  }
  /// A value of a field; floats are finite, of any size and sign.
  [[nodiscard]] Values values(const Field& field) {
    Values values(field.bytes);
    for (std::byte& value : values) value = static_cast<std::byte>(below(256));
    if (field.kind == Kind::integer) return values;
    for (std::size_t last = field.item - 1; last < values.size(); last += field.item) {
      values[last] &= std::byte{0xBF};  // a bit of the exponent of each kind
    }
    return values;
  }
  [[nodiscard]] Field field(const std::string& name) {
    constexpr std::pair<Kind, std::size_t> kinds[] = {
        {Kind::integer, 1}, {Kind::integer, 8}, {Kind::float16, 2}, {Kind::bfloat16, 2}, {Kind::float32, 4}};
    const auto [kind, item] = kinds[below(std::size(kinds))];
    return {name, item * (1 + below(7)), item, kind};
  }
  [[nodiscard]] Layout layout() {
    const Field observation = field("observation");
    std::vector<Field> fields;
    for (std::uint32_t left = 1 + below(3); left > 0; --left)
      fields.push_back(field("field" + to_string(left)));
    return {observation, fields, static_cast<std::size_t>(of({1, 1, 2, 3, 4, 70}))};
  }
  [[nodiscard]] Request request(std::size_t tasks) {
    constexpr double discounts[] = {0.0, 0.5, 0.99, 1.0};
    Ids listed;
    if (one_in(3)) {
      for (std::size_t task = 0; task < tasks; ++task) {
        if (!one_in(3))
          listed.insert(listed.begin() + below(1 + static_cast<std::uint32_t>(listed.size())),
                        static_cast<std::int64_t>(task));
      }
    }
    std::vector<double> weights(one_in(3) ? (listed.empty() ? tasks : listed.size()) : 0);
    for (double& weight : weights) weight = below(4) / 3.0;
    if (!weights.empty()) weights[below(static_cast<std::uint32_t>(weights.size()))] = 0.7;
    return {1 + below(5), discounts[below(4)], listed, weights};
  }

 private:
  std::uint64_t seed_;
  std::uint32_t next_ = 0;
};

struct Transition {
  Values observation;
  std::vector<Values> fields;
  float reward;
  bool terminated, truncated;
  Values successor;
  bool starts = true;  // does not go on from the transition before it
  float priority = 1.0f;
};

/// All transitions that were ever added, and rules so short that they can be seen to be right.
class List {
 public:
  struct Stream {
    std::int64_t task;
    std::size_t capacity = 0;
    std::size_t size = 0;   // of `all`, the newest, can be sampled
    std::size_t kept = 0;   // of `all`, the newest, are in memory
    std::size_t phase = 0;  // cell of the next transition
    std::vector<Transition> all{};
  };

  List(Layout layout, const Ids& capacities, const Ids& task_ids) : layout_(std::move(layout)) {
    for (const std::int64_t task : task_ids) streams.push_back({task});
    recapacitate(capacities);
  }
  /// What loading into a store of other capacities does.
  void recapacitate(const Ids& capacities) {
    for (Stream& stream : streams) {
      const auto same = [&](const Stream& other) { return other.task == stream.task; };
      const auto count = static_cast<std::size_t>(std::ranges::count_if(streams, same));
      const auto of_task = static_cast<std::size_t>(capacities[static_cast<std::size_t>(stream.task)]);
      const std::size_t before = std::exchange(stream.capacity, (of_task + count - 1) / count);
      stream.size = std::min(stream.size, stream.capacity);
      stream.kept = std::min(stream.kept, stream.capacity + layout_.stack - 1);
      if (before != stream.capacity) stream.phase = stream.size % stream.capacity;
    }
  }
  void add(std::size_t s, Transition transition) {
    Stream& stream = streams[s];
    transition.starts = stream.all.empty() || stream.all.back().terminated || stream.all.back().truncated ||
                        stream.all.back().successor != transition.observation;
    transition.priority = largest;
    stream.all.push_back(std::move(transition));
    stream.size = std::min(stream.size + 1, stream.capacity);
    stream.kept = std::min(stream.kept + 1, stream.capacity + layout_.stack - 1);
    stream.phase = (stream.phase + 1) % stream.capacity;
  }

  /// Successors that cannot be the observation of a next transition.
  [[nodiscard]] std::size_t aside() const {
    std::size_t count = 0;
    for (const auto& [task, capacity, size, kept, phase, all] : streams) {
      for (std::size_t t = all.size() - kept; t < all.size(); ++t) {
        const bool left = t + 1 < all.size() && all[t + 1].starts;
        count += left || all[t].terminated || all[t].truncated;
      }
    }
    return count;
  }

  [[nodiscard]] bool serves(const Request& request, std::size_t batch_size) const {
    std::size_t stored = 0;
    const std::size_t listed = request.tasks.empty() ? tasks() : request.tasks.size();
    for (std::size_t i = 0; i < listed; ++i) {
      const std::int64_t task = request.tasks.empty() ? static_cast<std::int64_t>(i) : request.tasks[i];
      std::size_t of_task = 0;
      for (const Stream& stream : streams) of_task += stream.task == task ? stream.size : 0;
      if (!request.weights.empty() && request.weights[i] > 0.0 && of_task == 0) return false;
      stored += of_task;
    }
    return batch_size <= stored && (!request.beta || std::ranges::any_of(powers(), std::identity{}));
  }

  [[nodiscard]] std::int64_t index_of(std::size_t s, std::size_t t) const {
    return static_cast<std::int64_t>(t * streams.size() + s);
  }

  /// Whether the transition is still stored; then it has another priority now.
  bool prioritize(std::int64_t index, float priority) {
    const auto count = static_cast<std::int64_t>(streams.size());
    Stream& stream = streams[static_cast<std::size_t>(index % count)];
    const auto t = static_cast<std::size_t>(index / count);
    if (t + stream.size < stream.all.size()) return false;
    stream.all[t].priority = priority;
    largest = std::max(largest, priority);
    return true;
  }

  /// Batch number `draw`, drawn as ReplayIndex says.
  void sample(const Request& request, std::uint64_t seed, std::uint64_t draw, std::size_t first,
              std::size_t batch_size, Batch& out) const {
    if (request.beta) return sample_by_priority(request, seed, draw, first, batch_size, out);
    const auto word = [&](std::uint32_t quad, std::uint32_t attempt, std::size_t i) {
      const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
      return philox4x32({low(draw), low(draw >> 32), quad, attempt}, {low(seed), low(seed >> 32)})[i % 4];
    };
    const double offset = word(0xFFFFFFFF, 0, 0) / 4294967296.0;
    const Groups groups = groups_of(request);
    for (std::size_t i = 0; i < batch_size; ++i) {
      std::size_t g = 0;
      const auto after = [&] {
        const double share = groups[g].share / groups.back().share;
        return static_cast<double>(i) >= share * static_cast<double>(batch_size) - offset;
      };
      while (g + 1 < groups.size() && after()) ++g;
      const auto& cells = groups[g].cells;
      const BoundedDraw bounded(static_cast<std::uint32_t>(cells.size()));
      std::uint32_t k = 0;
      std::uint32_t attempt = 0;
      const auto refused = [&] {
        const std::uint32_t random = word(static_cast<std::uint32_t>(i / 4), attempt, i);
        return !bounded(random, k) || cells[k].second == kEmpty;
      };
      while (refused()) ++attempt;
      put(cells[k].first, cells[k].second, request, first + i, out);
    }
  }

  /// Puts transition `t` of stream `s`, summed over as many steps as it has, at row `i` of a batch.
  void put(std::size_t s, std::size_t t, const Request& request, std::size_t i, Batch& out) const {
    const auto& all = streams[s].all;
    float reward = all[t].reward;
    std::size_t last = t;
    while (last - t + 1 < request.powers.size() && last + 1 < all.size() && !all[last + 1].starts) {
      ++last;
      reward += request.powers[last - t] * all[last].reward;
    }
    put_frames(all, t, layout_.stack, i, out.observations);
    put_frames(all, last, layout_.stack - 1, i, out.next_observations);
    test::put(out.next_observations, (i + 1) * layout_.stack - 1, all[last].successor);
    for (std::size_t f = 0; f < out.fields.size(); ++f) test::put(out.fields[f], i, all[t].fields[f]);
    out.rewards[i] = reward;
    out.masks[i] = all[last].terminated ? 0.0f : request.powers[last - t];
    out.task_ids[i] = streams[s].task;
    out.terminated[i] = all[last].terminated;
    out.truncated[i] = all[last].truncated;
    out.steps[i] = static_cast<std::int64_t>(last - t + 1);
    out.indices[i] = index_of(s, t);
  }

  std::vector<Stream> streams;
  double alpha = 0.0;
  float largest = 1.0f;  // priority so far

 private:
  static constexpr std::size_t kEmpty = SIZE_MAX;
  using Cells =
      std::vector<std::pair<std::size_t, std::size_t>>;  // stream and number of the transition, or kEmpty
  struct Group {
    double share;  // cumulative
    Cells cells;
  };
  using Groups = std::vector<Group>;

  [[nodiscard]] std::size_t tasks() const {
    return 1 + static_cast<std::size_t>(std::ranges::max(streams, {}, &Stream::task).task);
  }
  [[nodiscard]] Groups groups_of(const Request& request) const {
    if (request.weights.empty()) return {{1.0, cells_of(request.tasks)}};
    Groups groups;
    double sum = 0.0;
    for (std::size_t i = 0; i < request.weights.size(); ++i) {
      const std::int64_t task = request.tasks.empty() ? static_cast<std::int64_t>(i) : request.tasks[i];
      sum += request.weights[i];
      if (request.weights[i] > 0.0) groups.push_back({sum, cells_of({task})});
    }
    return groups;
  }
  [[nodiscard]] std::size_t in_cell(const Stream& stream, std::size_t cell) const {
    const std::size_t back = (stream.phase + 2 * stream.capacity - 1 - cell) % stream.capacity;
    return back < stream.size ? stream.all.size() - 1 - back : kEmpty;
  }
  [[nodiscard]] Cells all_cells() const {
    Cells cells;
    for (std::size_t s = 0; s < streams.size(); ++s) {
      for (std::size_t cell = 0; cell < streams[s].capacity; ++cell) {
        cells.emplace_back(s, in_cell(streams[s], cell));
      }
    }
    return cells;
  }
  [[nodiscard]] Cells cells_of(const Ids& listed) const {
    Cells cells;
    for (std::size_t s = 0; s < streams.size(); ++s) {
      const auto& [task, capacity, size, kept, phase, all] = streams[s];
      if (size == 0 || (!listed.empty() && std::ranges::find(listed, task) == listed.end())) continue;
      for (std::size_t cell = 0; cell < std::min(std::bit_ceil(size), capacity); ++cell) {
        cells.emplace_back(s, in_cell(streams[s], cell));
      }
    }
    return cells;
  }
  /// Of all cells of all streams; zero for those without a transition.
  [[nodiscard]] std::vector<long double> powers() const {
    std::vector<long double> powers;
    for (const auto& [s, t] : all_cells()) {
      const long double priority = t == kEmpty ? 0.0f : streams[s].all[t].priority;
      powers.push_back(priority == 0.0L ? 0.0L : std::pow(priority, static_cast<long double>(alpha)));
    }
    return powers;
  }
  void sample_by_priority(const Request& request, std::uint64_t seed, std::uint64_t draw, std::size_t first,
                          std::size_t batch_size, Batch& out) const {
    const auto cells = all_cells();
    const auto shares = powers();
    const long double sum = std::accumulate(shares.begin(), shares.end(), 0.0L);
    std::vector<long double> weights;
    for (std::size_t i = 0; i < batch_size; ++i) {
      const auto words = draw_words(seed, draw, static_cast<std::uint32_t>(i / 2), 0);
      const std::uint64_t bits = std::uint64_t{words[i % 2 * 2]} << 32 | words[i % 2 * 2 + 1];
      long double left = static_cast<long double>(bits >> 11) * 0x1p-53L * sum;
      std::size_t cell = 0;
      while (shares[cell] == 0.0L || left >= shares[cell]) left -= shares[cell++];
      put(cells[cell].first, cells[cell].second, request, first + i, out);
      weights.push_back(std::pow(100.0L * shares[cell] / sum, static_cast<long double>(-*request.beta)));
    }
    const long double most = std::ranges::max(weights);
    for (std::size_t i = 0; i < batch_size; ++i)
      out.weights[first + i] = static_cast<float>(weights[i] / most);
  }
  /// The `frames` observations up to that of `t`, the first of an episode as often as frames are missing.
  void put_frames(const std::vector<Transition>& all, std::size_t t, std::size_t frames, std::size_t i,
                  Values& out) const {
    for (std::size_t f = frames; f-- > 0;) {
      test::put(out, i * layout_.stack + f, all[t].observation);
      if (!all[t].starts) --t;
    }
  }

  Layout layout_;
};

}  // namespace brc::test
