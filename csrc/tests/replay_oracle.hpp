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
using Parts = std::vector<Values>;      // of an observation, or columns of them
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

inline void put(Parts& columns, std::size_t index, const Parts& values) {
  for (std::size_t p = 0; p < columns.size(); ++p) put(columns[p], index, values[p]);
}

struct Transition {
  Parts observation;
  std::vector<Values> fields;
  float reward;
  bool terminated, truncated;
  Parts successor;
  bool starts = true;  // does not go on from the transition before it
  float priority = 1.0f;
};

/// M transitions to add. Each column is as long as it must be: a sanitizer sees whoever reads further.
struct Rows {
  Rows(const Layout& layout, std::size_t count) : rewards(count), terminated(count), truncated(count) {
    for (const Part& part : layout.parts) observations.emplace_back(count * part.field.bytes);
    successors = observations;
    for (const Field& field : layout.fields) fields.emplace_back(count * field.bytes);
  }
  void set(std::size_t i, const Transition& transition) {
    put(observations, i, transition.observation);
    for (std::size_t f = 0; f < fields.size(); ++f) put(fields[f], i, transition.fields[f]);
    rewards[i] = transition.reward;
    terminated[i] = transition.terminated ? 2 : 0;
    truncated[i] = transition.truncated ? 1 : 0;
    put(successors, i, transition.successor);
  }
  [[nodiscard]] TransitionColumns columns() const {
    TransitionColumns columns{{}, {}, rewards, terminated, truncated, {}, {}};
    std::ranges::copy(observations, columns.observations.begin());
    std::ranges::copy(fields, columns.fields.begin());
    std::ranges::copy(successors, columns.successors.begin());
    return columns;
  }
  Parts observations;
  std::vector<Values> fields;
  std::vector<float> rewards;
  std::vector<unsigned char> terminated, truncated;
  Parts successors;
};

/// B sampled transitions.
struct Batch {
  Batch(const Layout& layout, std::size_t count, bool weighted = false)
      : rewards(count),
        masks(count),
        task_ids(count),
        terminated(count, 7),
        truncated(count, 7),
        steps(count),
        indices(count),
        weights(weighted ? count : 0) {
    for (const Part& part : layout.parts) observations.emplace_back(count * part.stack * part.field.bytes);
    next_observations = observations;
    for (const Field& field : layout.fields) fields.emplace_back(count * field.bytes);
  }
  [[nodiscard]] BatchColumns columns() {
    BatchColumns columns{{},         {},        rewards, masks,   {},     task_ids,
                         terminated, truncated, steps,   indices, weights};
    std::ranges::copy(observations, columns.observations.begin());
    std::ranges::copy(fields, columns.fields.begin());
    std::ranges::copy(next_observations, columns.next_observations.begin());
    return columns;
  }
  bool operator==(const Batch&) const = default;
  Parts observations;
  std::vector<Values> fields;
  std::vector<float> rewards, masks;
  Parts next_observations;
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
  [[nodiscard]] Parts values(const std::vector<Part>& parts) {
    Parts all;
    for (const Part& part : parts) all.push_back(values(part.field));
    return all;
  }
  /// One part that is observed, or up to three with stacks of their own.
  [[nodiscard]] Layout layout() {
    std::vector<Part> parts;
    for (int left = of({1, 1, 2, 3}); left > 0; --left) {
      parts.push_back(
          {field("part" + to_string(left)), static_cast<std::size_t>(of({1, 1, 2, 3, 4, 70})), 0});
    }
    std::vector<Field> fields;
    for (std::uint32_t left = 1 + below(3); left > 0; --left)
      fields.push_back(field("field" + to_string(left)));
    return {parts, fields};
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

/// All transitions that were ever added and not taken back, and rules so short that they can be seen to be
/// right.
class List {
 public:
  struct Stream {
    std::int64_t task;
    std::size_t capacity = 0;
    std::size_t size = 0;   // of `all`, the newest, can be sampled
    std::size_t kept = 0;   // of `all`, the newest, are in memory
    std::size_t phase = 0;  // cell of the next transition
    bool left = false;      // the next transition does not go on from the newest
    std::vector<Transition> all{};
    [[nodiscard]] std::size_t oldest() const { return all.size() - size; }
    /// Whether an episode begins with a transition, as far as the rows kept tell.
    [[nodiscard]] bool begins(std::size_t t) const { return t + kept == all.size() || all[t].starts; }
    /// Whether its successor cannot be the observation of the next transition.
    [[nodiscard]] bool ends(std::size_t t) const {
      const bool leaves = t + 1 == all.size() ? left : all[t + 1].starts;
      return leaves || all[t].terminated || all[t].truncated;
    }
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
    transition.starts = stream.all.empty() || stream.ends(stream.all.size() - 1) ||
                        stream.all.back().successor != transition.observation;
    stream.left = false;
    transition.priority = largest;
    stream.all.push_back(std::move(transition));
    stream.size = std::min(stream.size + 1, stream.capacity);
    stream.kept = std::min(stream.kept + 1, stream.capacity + layout_.stack - 1);
    stream.phase = (stream.phase + 1) % stream.capacity;
  }

  void clear() {
    for (Stream& stream : streams) stream = {stream.task, stream.capacity};
    largest = 1.0f;
  }
  void clear(const Ids& ids) {
    for (const std::int64_t id : ids) {
      Stream& stream = streams[static_cast<std::size_t>(id)];
      stream = {stream.task, stream.capacity};
    }
  }
  std::size_t discard_episode(std::size_t s) {
    Stream& stream = streams[s];
    if (stream.size == 0) return 0;
    std::size_t first = stream.all.size() - 1;
    while (!stream.begins(first)) --first;
    const std::size_t gone = stream.all.size() - first;
    const std::size_t taken = std::min(gone, stream.size);
    stream.all.resize(first);
    stream.kept -= gone;
    stream.size -= taken;
    stream.phase = stream.size;
    stream.left = true;
    return taken;
  }
  void reset(const Ids& ids) {
    for (const std::int64_t id : ids) streams[static_cast<std::size_t>(id)].left = true;
  }

  [[nodiscard]] std::int64_t name(std::size_t s, std::size_t t) const {
    return static_cast<std::int64_t>(t * streams.size() + s);
  }
  /// Of all that can be sampled.
  [[nodiscard]] Ids names() const {
    Ids names;
    for (std::size_t s = 0; s < streams.size(); ++s) {
      for (std::size_t t = streams[s].oldest(); t < streams[s].all.size(); ++t) names.push_back(name(s, t));
    }
    return names;
  }
  /// Puts the transition of a name at row `i` of a batch.
  void read(std::int64_t name, const Request& request, std::size_t i, Batch& out) const {
    const auto number = static_cast<std::size_t>(name);
    put(number % streams.size(), number / streams.size(), request, i, out);
  }

  /// Successors that cannot be the observation of a next transition.
  [[nodiscard]] std::size_t aside() const {
    std::size_t count = 0;
    for (const Stream& stream : streams) {
      for (std::size_t t = stream.all.size() - stream.kept; t < stream.all.size(); ++t) {
        count += stream.ends(t);
      }
    }
    return count;
  }

  [[nodiscard]] bool serves_sequences(std::size_t length) const {
    return std::ranges::any_of(streams, [&](const Stream& stream) { return stream.size >= length; });
  }
  /// Batch number `draw` of sequences, drawn like elements of a batch from all that could come first.
  [[nodiscard]] Sequences sequences(std::uint64_t seed, std::uint64_t draw, std::size_t batch_size,
                                    std::size_t length) const {
    std::vector<std::pair<std::size_t, std::size_t>> firsts;
    for (std::size_t s = 0; s < streams.size(); ++s) {
      const Stream& stream = streams[s];
      for (std::size_t t = stream.oldest(); t + length <= stream.all.size(); ++t) firsts.emplace_back(s, t);
    }
    const BoundedDraw bounded(static_cast<std::uint32_t>(firsts.size()));
    Sequences made;
    for (std::size_t i = 0; i < batch_size; ++i) {
      std::uint32_t k = 0;
      std::uint32_t attempt = 0;
      while (!bounded(word(seed, draw, static_cast<std::uint32_t>(i / 4), attempt, i), k)) ++attempt;
      const auto [s, first] = firsts[k];
      for (std::size_t t = first; t < first + length; ++t) {
        made.indices.push_back(name(s, t));
        made.starts.push_back(streams[s].begins(t));
      }
    }
    return made;
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

  /// Whether the transition of a name is still stored; then it has another priority now.
  bool prioritize(std::int64_t name, float priority) {
    const auto number = static_cast<std::size_t>(name);
    Stream& stream = streams[number % streams.size()];
    const std::size_t t = number / streams.size();
    if (t < stream.oldest()) return false;
    stream.all[t].priority = priority;
    largest = std::max(largest, priority);
    return true;
  }

  /// Batch number `draw`, drawn as ReplayIndex says.
  void sample(const Request& request, std::uint64_t seed, std::uint64_t draw, std::size_t first,
              std::size_t batch_size, Batch& out) const {
    if (request.beta) return sample_by_priority(request, seed, draw, first, batch_size, out);
    const double offset = word(seed, draw, 0xFFFFFFFF, 0, 0) / 4294967296.0;
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
        const std::uint32_t random = word(seed, draw, static_cast<std::uint32_t>(i / 4), attempt, i);
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
    for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
      const std::size_t stack = layout_.parts[p].stack;
      put_frames(all, t, p, stack, i, out.observations[p]);
      put_frames(all, last, p, stack - 1, i, out.next_observations[p]);
      test::put(out.next_observations[p], (i + 1) * stack - 1, all[last].successor[p]);
    }
    for (std::size_t f = 0; f < out.fields.size(); ++f) test::put(out.fields[f], i, all[t].fields[f]);
    out.rewards[i] = reward;
    out.masks[i] = all[last].terminated ? 0.0f : request.powers[last - t];
    out.task_ids[i] = streams[s].task;
    out.terminated[i] = all[last].terminated;
    out.truncated[i] = all[last].truncated;
    out.steps[i] = static_cast<std::int64_t>(last - t + 1);
    out.indices[i] = name(s, t);
  }

  std::vector<Stream> streams;
  double alpha = 0.0;
  float largest = 1.0f;  // priority since the list was empty

 private:
  static constexpr std::size_t kEmpty = SIZE_MAX;
  // Stream and number of the transition, or kEmpty.
  using Cells = std::vector<std::pair<std::size_t, std::size_t>>;
  struct Group {
    double share;  // cumulative
    Cells cells;
  };
  using Groups = std::vector<Group>;

  /// What element `i` takes from the Philox block of a quad of elements and an attempt.
  static std::uint32_t word(std::uint64_t seed, std::uint64_t draw, std::uint32_t quad, std::uint32_t attempt,
                            std::size_t i) {
    const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
    return philox4x32({low(draw), low(draw >> 32), quad, attempt}, {low(seed), low(seed >> 32)})[i % 4];
  }

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
  /// Appends the first cells of a stream.
  void put_cells(std::size_t s, std::size_t count, Cells& cells) const {
    const auto& [task, capacity, size, kept, phase, left, all] = streams[s];
    for (std::size_t cell = 0; cell < count; ++cell) {
      const std::size_t back = (phase + 2 * capacity - 1 - cell) % capacity;
      cells.emplace_back(s, back < size ? all.size() - 1 - back : kEmpty);
    }
  }
  [[nodiscard]] Cells all_cells() const {
    Cells cells;
    for (std::size_t s = 0; s < streams.size(); ++s) put_cells(s, streams[s].capacity, cells);
    return cells;
  }
  [[nodiscard]] Cells cells_of(const Ids& listed) const {
    Cells cells;
    for (std::size_t s = 0; s < streams.size(); ++s) {
      const Stream& stream = streams[s];
      if (!listed.empty() && std::ranges::find(listed, stream.task) == listed.end()) continue;
      if (stream.size > 0) put_cells(s, std::min(std::bit_ceil(stream.size), stream.capacity), cells);
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
    const Cells cells = all_cells();
    const auto shares = powers();
    const long double sum = std::accumulate(shares.begin(), shares.end(), 0.0L);
    std::vector<long double> weights;
    for (std::size_t i = 0; i < batch_size; ++i) {
      const auto number = [&](std::size_t half) {
        return std::uint64_t{word(seed, draw, static_cast<std::uint32_t>(i / 2), 0, 2 * i + half)};
      };
      const std::uint64_t bits = number(0) << 32 | number(1);
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
  /// The `frames` observations of a part up to that of `t`, the first of an episode as often as frames are
  /// missing.
  void put_frames(const std::vector<Transition>& all, std::size_t t, std::size_t p, std::size_t frames,
                  std::size_t i, Values& out) const {
    for (std::size_t f = frames; f-- > 0;) {
      test::put(out, i * layout_.parts[p].stack + f, all[t].observation[p]);
      if (!all[t].starts) --t;
    }
  }

  Layout layout_;
};

}  // namespace brc::test
