// Files of a ReplayStore changed at random, most of them with checksums that are right again: they are
// refused, and change nothing, or loaded, and the store goes on like any other. An argument says how many.
#include <cstdio>
#include <cstdlib>

#include "checksum.hpp"
#include "replay_walk.hpp"

namespace brc::test {
namespace {

struct Segment {
  SegmentTable table;
  Values bytes;
};

/// What `load` is given.
struct Files {
  Content content;
  std::vector<Segment> segments;
};

constexpr std::size_t kBlock = std::size_t{4} << 20;

Values read_all(const ReplayStore& store, const Ids& names) {
  Batch batch(store.layout(), names.size());
  store.read(names, {3, 0.9, {}, {}}, batch.columns());
  Values all;
  const auto append = [&](const auto& column) {
    const auto bytes = std::as_bytes(std::span(column));
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  for (const Values& column : batch.observations) append(column);
  for (const Values& column : batch.next_observations) append(column);
  for (const Values& column : batch.fields) append(column);
  append(batch.rewards);
  append(batch.masks);
  append(batch.terminated);
  append(batch.truncated);
  append(batch.steps);
  append(batch.indices);
  return all;
}

class Fuzz {
 public:
  explicit Fuzz(std::uint64_t seed) : random_(seed + 1000), walk_(seed) {
    for (std::uint32_t segments = 1 + random_.below(3); segments > 0; --segments) {
      for (std::uint32_t times = random_.below(20); times > 0; --times) walk_.add();
      if (random_.one_in(3)) walk_.reset();
      if (walk_.alpha && random_.one_in(2)) walk_.prioritize();
      walk_.saves.write(*walk_.store, false);
    }
    original_.content = walk_.saves.content;
    for (const SegmentFile& segment : walk_.saves.segments) {
      Values bytes(segment.table.bytes);
      const auto size = static_cast<ssize_t>(bytes.size());
      check(::pread(segment.file, bytes.data(), bytes.size(), 0) == size, "a file can be read");
      original_.segments.push_back({segment.table, std::move(bytes)});
    }
    if (random_.one_in(2)) {
      for (std::int64_t& capacity : walk_.capacities) capacity = random_.of({1, 2, 3, 8, 30});
    }
    alpha_ = random_.one_in(4) ? std::optional(0.5) : walk_.alpha;
    victim_ = std::make_unique<ReplayStore>(walk_.layout, walk_.capacities, walk_.task_ids, 5,
                                            random_.one_in(2), alpha_);
  }

  /// Whether files changed in a few places were loaded.
  bool load_changed() {
    Files files = original_;
    for (int left = random_.of({0, 1, 1, 1, 2, 3, 6}); left > 0; --left) change(files);
    if (!random_.one_in(8)) {
      for (Segment& segment : files.segments) forge_checksums(segment);
    }
    std::vector<File> opened(files.segments.size());
    std::vector<SegmentFile> segments;
    for (std::size_t i = 0; i < opened.size(); ++i) {
      const Values& bytes = files.segments[i].bytes;
      const auto size = static_cast<ssize_t>(bytes.size());
      check(::pwrite(opened[i].number(), bytes.data(), bytes.size(), 0) == size, "a file can be written");
      segments.push_back({opened[i].number(), files.segments[i].table, "segment"});
    }
    const Ids names = victim_->indices();
    const Values before = read_all(*victim_, names);
    try {
      victim_->load(files.content, segments, random_.below(9));
    } catch (const std::invalid_argument&) {
      check(victim_->indices() == names && read_all(*victim_, names) == before, "a refusal changes nothing");
      return false;
    }
    go_on(files.content);
    return true;
  }

 private:
  void go_on(const Content& content) {
    const std::vector<std::int64_t> sizes = victim_->sizes(), capacities = victim_->capacities();
    for (std::size_t s = 0; s < sizes.size(); ++s) {
      check(sizes[s] == std::min<std::int64_t>(content.size[s], capacities[s]), "a load keeps what fits");
    }
    // At the largest numbers, nothing more may be counted.
    const std::uint64_t most = std::max(content.draws, *std::ranges::max_element(content.count));
    if (most > (1ull << 62) / walk_.task_ids.size() - 1000) return;
    (void)read_all(*victim_, victim_->indices());
    for (std::uint32_t times = random_.below(4); times > 0; --times) {
      const Rows rows(walk_.layout, walk_.task_ids.size());
      victim_->add(rows.columns());
      victim_->extend(0, rows.columns());
    }
    if (random_.one_in(4)) (void)victim_->discard_episode(0);
    if (const std::size_t size = victim_->size(); size > 0) {
      Batch batch(walk_.layout, std::min<std::size_t>(size, 9));
      victim_->sample({2, 0.9, {}, {}}, 1, batch.rewards.size(), batch.columns());
      (void)victim_->sequences(3, 1);
      if (alpha_) {
        victim_->set_priorities(Ids{victim_->indices().back()}, std::vector{1.5f});
        Batch weighted(walk_.layout, batch.rewards.size(), true);
        victim_->sample({2, 0.9, {}, {}, 0.5}, 1, weighted.rewards.size(), weighted.columns());
        for (const float weight : weighted.weights)
          check(weight > 0.0f && weight <= 1.0f, "weights are at most 1");
      }
    }
    Saves saves;
    saves.write(*victim_, true);
    const Ids names = victim_->indices();
    const Values before = read_all(*victim_, names);
    saves.load(*victim_, 1);
    check(victim_->indices() == names && read_all(*victim_, names) == before, "what was loaded can be saved");
  }

  static void forge_checksums(Segment& segment) {
    segment.table.bytes = segment.bytes.size();
    segment.table.checksums.clear();
    for (std::size_t at = 0; at < segment.bytes.size(); at += kBlock) {
      const std::size_t bytes = std::min(kBlock, segment.bytes.size() - at);
      segment.table.checksums.push_back(crc32c(0, &segment.bytes[at], bytes));
    }
  }

  template <class Number>
  void change(Number& number) {
    const auto step = static_cast<Number>(1 + random_.below(3));
    switch (random_.below(8)) {
      case 0:
        number = 0;
        break;
      case 1:
        number = std::numeric_limits<Number>::max();
        break;
      case 2:
        number = static_cast<Number>(std::numeric_limits<Number>::max() / 2);
        break;
      case 3:
        number = static_cast<Number>(random_.below(40));
        break;
      case 4:
        number = static_cast<Number>(Number{1} << random_.below(8 * sizeof(Number) - 1));
        break;
      case 5:
        number = static_cast<Number>(static_cast<std::uint64_t>(number) - step);
        break;
      default:
        number = static_cast<Number>(static_cast<std::uint64_t>(number) + step);
    }
  }
  template <class Number>
  void change(std::vector<Number>& numbers) {
    if (random_.one_in(30)) numbers.resize(random_.below(5));
    if (!numbers.empty()) change(numbers[random_.below(static_cast<std::uint32_t>(numbers.size()))]);
  }
  void change(Values& bytes) {
    const auto at = [&] { return random_.below(1 + static_cast<std::uint32_t>(bytes.size())); };
    const std::uint32_t kind = random_.below(6);
    if (kind == 0) bytes.resize(at());
    if (kind == 1) bytes.resize(bytes.size() + random_.below(300));
    if (kind == 2) bytes.insert(bytes.begin() + at(), 1 + random_.below(200), std::byte{0});
    if (bytes.empty() || kind < 3) return;
    const std::size_t used = walk_.layout.used;
    const std::size_t row = random_.below(static_cast<std::uint32_t>(bytes.size() / used) + 1) * used;
    if (kind < 5 && row + used <= bytes.size()) {  // the flags of a row, where they are
      bytes[row + walk_.layout.link + 3 * random_.below(2)] ^= std::byte{1} << random_.of({0, 0, 6, 7, 5});
    } else {
      bytes[random_.below(static_cast<std::uint32_t>(bytes.size()))] ^= std::byte{1} << random_.below(8);
    }
  }
  /// Numbers that belong together, of one stream.
  void change_together(Files& files) {
    Content& content = files.content;
    const auto s =
        static_cast<std::uint32_t>(random_.below(static_cast<std::uint32_t>(content.count.size())));
    if (std::min({content.size.size(), content.kept.size(), content.phase.size(), content.capacity.size()}) <=
        s) {
      return;
    }
    const std::uint32_t by = 1 + random_.below(5);
    switch (random_.below(3)) {
      case 0:  // fewer rows are wanted
        content.kept[s] -= std::min(content.kept[s], by);
        content.size[s] = std::min(content.size[s], content.kept[s]);
        if (content.size[s] < content.capacity[s]) content.phase[s] = content.size[s];
        break;
      case 1:  // all numbers are later ones
        content.count[s] += by;
        for (Segment& segment : files.segments) {
          if (s < segment.table.first.size()) segment.table.first[s] += by;
        }
        break;
      default:  // another capacity
        content.capacity[s] = content.size[s] + by;
        content.phase[s] = content.size[s];
    }
  }
  /// One of the priorities, which are the last of a file.
  void change_priority(Segment& segment) {
    constexpr float values[] = {0.0f, -1.0f, 2.0f, 1e38f, INFINITY, NAN};
    const std::uint64_t bytes = segment.table.priorities * sizeof(float);
    if (bytes == 0 || bytes > segment.bytes.size()) return;
    const std::size_t at = random_.below(static_cast<std::uint32_t>(segment.table.priorities));
    std::memcpy(&segment.bytes[segment.bytes.size() - bytes + at * sizeof(float)], &values[random_.below(6)],
                sizeof(float));
  }
  void change(Files& files) {
    Content& content = files.content;
    std::vector<Segment>& segments = files.segments;
    const std::uint32_t kind = random_.below(19);
    if (kind < 3 || segments.empty()) {
      if (!content.count.empty()) change_together(files);
      return;
    }
    const std::uint32_t at = random_.below(static_cast<std::uint32_t>(segments.size()));
    SegmentTable& table = segments[at].table;
    switch (kind) {
      case 3:
        return change(content.count);
      case 4:
        return change(content.size);
      case 5:
        return change(content.kept);
      case 6:
        return change(content.phase);
      case 7:
        return change(content.capacity);
      case 8:
        return change(content.draws);
      case 9:
        return change(table.first);
      case 10:
        return change(table.rows);
      case 11:
        return change(table.side);
      case 12:
        return change(table.head);
      case 13:
        if (random_.one_in(2)) return change(table.bytes);
        return change(table.checksums);
      case 14:
        if (random_.one_in(2)) {
          segments.erase(segments.begin() + at);
        } else {
          segments.insert(segments.begin() + random_.below(static_cast<std::uint32_t>(segments.size()) + 1),
                          Segment(segments[at]));
        }
        return;
      case 15:
        return std::swap(segments[at], segments[0]);
      case 16:
        if (random_.one_in(3)) return change(table.priorities);
        return change_priority(segments[at]);
      default:
        return change(segments[at].bytes);
    }
  }

  Random random_;
  Walk walk_;
  Files original_;
  std::optional<double> alpha_;  // of the victim
  std::unique_ptr<ReplayStore> victim_;
};

int run(std::uint64_t count) {
  std::uint64_t loaded = 0;
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t seed = done;
    try {
      Fuzz fuzz(seed);
      for (std::uint64_t left = std::min<std::uint64_t>(100, count - done); left > 0; --left, ++done) {
        loaded += fuzz.load_changed();
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "failed: %s, file %llu\n", error.what(), static_cast<unsigned long long>(done));
      return 1;
    }
  }
  std::printf("replay fuzz: %llu changed saves, of which %llu could be loaded\n",
              static_cast<unsigned long long>(count), static_cast<unsigned long long>(loaded));
  return 0;
}

}  // namespace
}  // namespace brc::test

int main(int count, char** values) {
  return brc::test::run(count > 1 ? std::strtoull(values[1], nullptr, 10) : 10000);
}
