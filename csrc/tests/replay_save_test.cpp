// Saves of a ReplayStore that others add to meanwhile: each must hold what was stored when it began. Its file
// is a pipe that is emptied block by block, so that the test knows how far the save is; rows are as large as
// blocks or nearly so, so that it stops between rows, between successors kept aside, and before the head.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <optional>

#include "replay_oracle.hpp"

namespace brc::test {
namespace {

constexpr std::size_t kBlock = std::size_t{4} << 20;  // bytes that a save writes at once

/// As == says, but byte by byte that takes a sanitizer long.
bool same(const Values& one, const Values& other) {
  if (one.size() != other.size()) return false;
  return one.empty() || std::memcmp(one.data(), other.data(), one.size()) == 0;
}

bool same(const Batch& one, const Batch& other) {
  const auto all = [](const Parts& parts, const Parts& others) {
    return std::ranges::equal(parts, others, [](const auto& a, const auto& b) { return same(a, b); });
  };
  return all(one.observations, other.observations) && all(one.next_observations, other.next_observations) &&
         one.fields == other.fields && one.rewards == other.rewards && one.masks == other.masks &&
         one.terminated == other.terminated && one.truncated == other.truncated &&
         one.indices == other.indices;
}

struct Saved {
  Snapshot snapshot;
  Values bytes;
};

/// What a save writes, where `meanwhile` runs whenever a block of it has begun to come.
Saved save_slowly(const ReplayStore& store, const std::vector<std::uint64_t>& from,
                  const std::function<void()>& meanwhile) {
  int ends[2];
  check(::pipe(ends) == 0, "a pipe can be made");
  std::future<Snapshot> save = std::async(std::launch::async, [&] {
    const std::unique_ptr<int, void (*)(int*)> end(&ends[1], [](int* file) { ::close(*file); });
    return store.write_segment(ends[1], from);
  });
  Saved saved;
  const auto read = [&](std::size_t bytes) {
    const std::size_t before = saved.bytes.size();
    saved.bytes.resize(before + bytes);
    std::size_t done = 0;
    while (done < bytes) {
      const ssize_t got = ::read(ends[0], saved.bytes.data() + before + done, bytes - done);
      check(got >= 0, "a pipe can be read");
      if (got == 0) break;
      done += static_cast<std::size_t>(got);
    }
    saved.bytes.resize(before + done);
    return done;
  };
  while (read(1) == 1) {
    meanwhile();
    read(kBlock - 1);
  }
  saved.snapshot = save.get();
  ::close(ends[0]);
  return saved;
}

/// What it writes while nobody adds.
Saved save_alone(const ReplayStore& store, const std::vector<std::uint64_t>& from) {
  const File file;
  Saved saved{store.write_segment(file.number(), from), {}};
  saved.bytes.resize(saved.snapshot.table.bytes);
  const auto size = static_cast<ssize_t>(saved.bytes.size());
  check(::pread(file.number(), saved.bytes.data(), saved.bytes.size(), 0) == size, "a file can be read");
  return saved;
}

void check_same(const Saved& got, const Saved& expected) {
  const auto content = [](const Saved& saved) -> const Content& { return saved.snapshot.content; };
  const auto table = [](const Saved& saved) -> const SegmentTable& { return saved.snapshot.table; };
  check(content(got).count == content(expected).count && content(got).size == content(expected).size &&
            content(got).kept == content(expected).kept && content(got).phase == content(expected).phase &&
            content(got).capacity == content(expected).capacity &&
            content(got).draws == content(expected).draws,
        "a save counts what was stored when it began");
  check(table(got).first == table(expected).first && table(got).rows == table(expected).rows &&
            table(got).head == table(expected).head && table(got).priorities == table(expected).priorities,
        "a save holds the rows that were stored when it began");
  check(table(got).side == table(expected).side, "and the successors that were kept aside then");
  check(table(got).bytes == got.bytes.size() && table(got).checksums == table(expected).checksums,
        "and knows what it wrote");
  check(same(got.bytes, expected.bytes), "each row is saved as it was when the save began");
}

/// A store that is saved, and a twin that gets the same transitions.
class Pair {
 public:
  explicit Pair(std::uint64_t seed)
      : random_(seed),
        alpha_(seed % 2 == 0 ? std::optional(0.6) : std::nullopt),
        layout_(make_layout()),
        capacities_(make_capacities()),
        store_(make()),
        twin_(make()) {
    for (std::int64_t s = 0; s < streams(); ++s) task_numbers_.push_back(0);
    for (std::uint32_t s = 0; s < capacities_.size(); ++s) extend(s, random_.below(6));
  }

  void save() {
    std::vector<std::uint64_t> from(capacities_.size());
    const bool all = !random_.one_in(3);
    if (!all) {
      for (std::uint64_t& first : from) first = random_.below(9);
    }
    const Ids names = store_->indices();
    const Request request{1 + random_.below(3), 0.9, {}, {}};
    const Batch before = read(*store_, names, request);
    const Saved expected = save_alone(*store_, from);
    const auto blocks = static_cast<std::uint32_t>(expected.snapshot.table.checksums.size());
    // All that was stored is replaced at once, or little by little.
    const std::uint32_t burst = random_.one_in(2) ? 1 + random_.below(1 + blocks) : 0;
    std::uint32_t block = 0;
    const Saved got = save_slowly(*store_, from, [&] {
      ++block;
      prioritize();
      if (burst == 0) add();
      if (block != burst) return;
      for (std::uint32_t s = 0; s < capacities_.size(); ++s) extend(s, 7);
    });
    check_same(got, expected);
    const Ids now = store_->indices();
    check(now == twin_->indices() && same(read(*store_, now, request), read(*twin_, now, request)),
          "a save does not change what is stored");
    if (all) check_loaded(got, names, request, before);
  }

 private:
  [[nodiscard]] std::int64_t streams() const { return static_cast<std::int64_t>(capacities_.size()); }
  [[nodiscard]] Layout make_layout() {
    // As large as a block, or two thirds of it, so that a save stops in other places each time.
    const std::size_t large =
        kBlock / static_cast<std::size_t>(random_.of({2, 2, 3})) * 2 - random_.below(64);
    std::vector<Part> parts{{{"large", large, 1, Kind::integer}, 1, 0}};
    if (random_.one_in(2)) {
      parts.insert(parts.begin() + random_.below(2),
                   {{"small", 12, 4, Kind::float32}, static_cast<std::size_t>(random_.of({1, 1, 2, 3})), 0});
    }
    return {parts, {{"action", 3, 1, Kind::integer}}};
  }
  [[nodiscard]] Ids make_capacities() {
    Ids capacities;
    for (std::uint32_t left = 1 + random_.below(3); left > 0; --left) {
      capacities.push_back(random_.of({1, 1, 1, 2, 3}));
    }
    return capacities;
  }
  [[nodiscard]] std::unique_ptr<ReplayStore> make() const {
    Ids tasks(capacities_.size());
    for (std::size_t s = 0; s < tasks.size(); ++s) tasks[s] = static_cast<std::int64_t>(s);
    return std::make_unique<ReplayStore>(layout_, capacities_, tasks, 3, false, alpha_);
  }

  [[nodiscard]] Parts observation(std::uint32_t number) const {
    Parts parts;
    for (const Part& part : layout_.parts) {
      Values& values = parts.emplace_back(part.field.bytes, static_cast<std::byte>(number % 61));
      std::memcpy(values.data(), &number, sizeof(number));
    }
    return parts;
  }
  /// Goes on from the last one of its stream every other time, and ends every fourth time.
  void put(Rows& rows, std::size_t i, std::size_t s) {
    std::uint32_t& number = task_numbers_[s];
    const std::uint32_t kind = random_.below(8);
    if (kind < 4) number = ++next_;
    const Parts seen = observation(number);
    number = ++next_;
    rows.set(i, {seen,
                 {Values(3, static_cast<std::byte>(number))},
                 static_cast<float>(number),
                 kind == 3,
                 kind == 4,
                 observation(number)});
  }
  void extend(std::uint32_t s, std::uint32_t count) {
    Rows rows(layout_, count);
    for (std::uint32_t i = 0; i < count; ++i) put(rows, i, s);
    for (ReplayStore* store : {store_.get(), twin_.get()}) store->extend(s, rows.columns());
  }
  /// To some streams, or two to one.
  void add() {
    if (random_.one_in(4)) {
      extend(random_.below(static_cast<std::uint32_t>(streams())), 2);
      return;
    }
    Ids ids;
    for (std::int64_t s = 0; s < streams(); ++s) {
      if (!random_.one_in(4)) ids.push_back(s);
    }
    Rows rows(layout_, ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) put(rows, i, static_cast<std::size_t>(ids[i]));
    for (ReplayStore* store : {store_.get(), twin_.get()}) store->add(ids, rows.columns());
  }

  /// Other priorities than the save holds, if there are any.
  void prioritize() {
    if (!alpha_) return;
    const Ids names = store_->indices();
    std::vector<float> priorities;
    for (const std::int64_t name : names) priorities.push_back(static_cast<float>((name + ++shift_) % 7));
    for (ReplayStore* store : {store_.get(), twin_.get()}) store->set_priorities(names, priorities);
  }

  [[nodiscard]] Batch read(const ReplayStore& store, const Ids& names, const Request& request) const {
    Batch batch(layout_, names.size());
    store.read(names, request, batch.columns());
    return batch;
  }
  void check_loaded(const Saved& saved, const Ids& names, const Request& request, const Batch& before) const {
    const File file;
    const auto size = static_cast<ssize_t>(saved.bytes.size());
    check(::write(file.number(), saved.bytes.data(), saved.bytes.size()) == size, "a file can be written");
    const SegmentFile segment{file.number(), saved.snapshot.table, "segment"};
    const std::unique_ptr<ReplayStore> loaded = make();
    loaded->load(saved.snapshot.content, std::span(&segment, 1), 0);
    check(loaded->indices() == names, "a load brings back what was stored when the save began");
    check(same(read(*loaded, names, request), before), "with every value");
  }

  Random random_;
  const std::optional<double> alpha_;
  const Layout layout_;
  const Ids capacities_;
  std::uint32_t next_ = 0;                   // number of an observation
  std::int64_t shift_ = 0;                   // of priorities
  std::vector<std::uint32_t> task_numbers_;  // [N] where the last transition of a stream led
  std::unique_ptr<ReplayStore> store_, twin_;
};

int run() {
  // In 38, rows are replaced between their successors, when some of those are written.
  for (const std::uint64_t seed : {0, 1, 2, 3, 4, 5, 6, 38}) {
    try {
      Pair pair(seed);
      for (int times = 0; times < 2; ++times) pair.save();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "failed: %s, seed %d\n", error.what(), static_cast<int>(seed));
      return 1;
    }
  }
  std::puts("replay saves: all checks passed");
  return 0;
}

}  // namespace
}  // namespace brc::test

int main() {
  return brc::test::run();
}
