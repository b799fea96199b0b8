// The files of a ReplayStore: whatever is damaged or contradicts itself is refused, and changes nothing.
#include <cmath>
#include <cstdio>
#include <system_error>

#include "checksum.hpp"
#include "replay_walk.hpp"

namespace brc::test {
namespace {

/// CRC-32C bit by bit, from its definition.
std::uint32_t by_bits(std::uint32_t before, const std::byte* data, std::size_t bytes) {
  std::uint32_t word = ~before;
  for (std::size_t i = 0; i < 8 * bytes; ++i) {
    const std::uint32_t bit = static_cast<std::uint32_t>(data[i / 8]) >> (i % 8) & 1u;
    word = (word >> 1) ^ (((word ^ bit) & 1u) != 0 ? 0x82F63B78u : 0u);
  }
  return ~word;
}

void checksums_are_crc32c() {
  const auto text = std::as_bytes(std::span("123456789", 9));
  Random random(0);
  const Values values = random.values({"bytes", 400, 1, Kind::integer});
  for (const auto checksum : {&crc32c, &crc32c_by_tables}) {
    check(checksum(0, text.data(), text.size()) == 0xE3069283, "the published check value");
    check(checksum(5, nullptr, 0) == 5, "nothing changes nothing");
    for (std::size_t from = 0; from < 9; ++from) {
      for (std::size_t bytes = 0; from + bytes <= values.size(); bytes += 1 + bytes / 20) {
        const std::byte* data = values.data() + from;
        const std::uint32_t whole = by_bits(0, data, bytes);
        check(checksum(0, data, bytes) == whole, "any length at any address");
        const std::size_t part = bytes / 3;
        check(checksum(checksum(0, data, part), data + part, bytes - part) == whole, "parts make the whole");
      }
    }
  }
}

void flip(int file, std::size_t at) {
  unsigned char byte = 0;
  check(::pread(file, &byte, 1, static_cast<off_t>(at)) == 1, "a byte can be read");
  byte = static_cast<unsigned char>(byte ^ (1u << (at % 8)));
  check(::pwrite(file, &byte, 1, static_cast<off_t>(at)) == 1, "a byte can be written");
}

void damaged_files_change_nothing(std::uint64_t seed) {
  Walk walk(seed);
  for (int step = 0; step < 30; ++step) walk.add();
  Saves& saves = walk.saves;
  saves.write(*walk.store, true);
  for (int step = 0; step < 5; ++step) walk.add();
  saves.write(*walk.store, false);
  for (int step = 0; step < 5; ++step) walk.add();
  const auto load = [&] { saves.load(*walk.store, 7); };
  for (const SegmentFile& segment : saves.segments) {
    const std::size_t bytes = segment.table.bytes;
    for (std::size_t at = seed % 7; at < bytes; at += 1 + bytes / 40) {
      flip(segment.file, at);
      walk.check_unchanged("damaged: the checksum of block 0 differs", load);
      flip(segment.file, at);
    }
  }
  const auto& [last, table, name] = saves.segments.back();
  for (const std::size_t cut : {std::size_t{1}, table.bytes / 2, std::size_t{table.bytes}}) {
    check(::ftruncate(last, static_cast<off_t>(table.bytes - cut)) == 0, "a file can be cut");
    walk.check_unchanged("truncated: it ends after " + to_string(table.bytes - cut) + " of", load);
  }
}

void tables_that_lie_change_nothing(std::uint64_t seed) {
  Walk walk(seed);
  for (int step = 0; step < 30; ++step) walk.add();
  walk.saves.write(*walk.store, true);
  using Lie = std::function<void(Content&, SegmentTable&)>;
  const std::pair<const char*, Lie> lies[] = {
      {"contradicts itself", [](Content&, SegmentTable& table) { table.head[0] ^= 1; }},
      {"contradicts itself", [](Content&, SegmentTable& table) { ++table.side[0]; }},
      {"has rows after its last", [](Content&, SegmentTable& table) { ++table.rows[0]; }},
      {"has rows after its last", [](Content&, SegmentTable& table) { ++table.first[0]; }},
      {"has rows after its last",
       [](Content& content, SegmentTable&) {
         --content.count[0];
         content.kept[0] = std::min<std::uint64_t>(content.kept[0], content.count[0]);
         if (content.size[0] <= content.kept[0]) return;
         content.size[0] = content.phase[0] = content.kept[0];
       }},
      {"has rows after its last",  // whose numbers pass the largest one, and end at the right one
       [](Content& content, SegmentTable& table) {
         table.first[0] = UINT64_MAX;
         content.count[0] = table.rows[0] - 1;
         content.kept[0] = std::min(content.kept[0], table.rows[0] - 1);
         content.size[0] = std::min(content.size[0], content.kept[0]);
         if (content.size[0] < content.capacity[0]) content.phase[0] = content.size[0];
       }},
      {"", [](Content&, SegmentTable& table) { --table.rows[0]; }},
      {"lacks rows", [](Content& content, SegmentTable&) { ++content.count[0]; }},
      {"block 0 differs", [](Content&, SegmentTable& table) { --table.bytes; }},
      {"is truncated", [](Content&, SegmentTable& table) { ++table.bytes; }},
      {"damaged", [](Content&, SegmentTable& table) { table.checksums.clear(); }},
      {"", [](Content& content, SegmentTable&) { ++content.kept[0]; }},
      {"more transitions than rows",
       [](Content& content, SegmentTable&) { content.size[0] = content.kept[0] + 1; }},
      {"contradict each other", [](Content& content, SegmentTable&) { content.phase[0] = 99; }},
      {"contradict each other", [](Content& content, SegmentTable&) { content.capacity[0] = 0; }},
      {"first must hold", [](Content&, SegmentTable& table) { table.first.pop_back(); }},
      {"rows must hold", [](Content&, SegmentTable& table) { table.rows.push_back(0); }},
      {"side must hold", [](Content&, SegmentTable& table) { table.side.clear(); }},
      {"head must hold", [](Content&, SegmentTable& table) { table.head.pop_back(); }},
      {"count must hold", [](Content& content, SegmentTable&) { content.count.pop_back(); }},
      {"phase must hold", [](Content& content, SegmentTable&) { content.phase.pop_back(); }},
  };
  for (const auto& [words, lie] : lies) {
    Content content = walk.saves.content;
    SegmentFile segment = walk.saves.segments[0];
    lie(content, segment.table);
    walk.check_unchanged(words, [&] { walk.store->load(content, std::span(&segment, 1), 7); });
  }
  walk.check_unchanged("lacks rows", [&] { walk.store->load(walk.saves.content, {}, 7); });
}

/// Files with right checksums that no store has written.
void forged_files_change_nothing(std::uint64_t seed) {
  Walk walk(seed);
  for (int step = 0; step < 30; ++step) walk.add();
  walk.saves.write(*walk.store, true);
  const std::size_t link = walk.layout.link;  // of the first row
  const std::uint32_t ended = kTerminated, unknown = 2;
  using Forge = std::function<void(Values&)>;
  const std::pair<const char*, Forge> forgeries[] = {
      {"longer than its streams", [](Values& file) { file.push_back({}); }},
      {"truncated", [](Values& file) { file.pop_back(); }},
      {"an end without its successor",
       [&](Values& file) { std::memcpy(&file[link], &ended, sizeof(ended)); }},
      {"unknown flags", [&](Values& file) { std::memcpy(&file[link], &unknown, sizeof(unknown)); }},
  };
  for (const auto& [words, forge] : forgeries) {
    SegmentFile segment = walk.saves.segments[0];
    Values content(segment.table.bytes);
    const auto size = static_cast<ssize_t>(content.size());
    check(::pread(segment.file, content.data(), content.size(), 0) == size, "a file can be read");
    forge(content);
    const File forged;
    check(::write(forged.number(), content.data(), content.size()) > 0, "a file can be written");
    segment.file = forged.number();
    segment.table.bytes = content.size();
    segment.table.checksums = {crc32c(0, content.data(), content.size())};
    walk.check_unchanged(words, [&] { walk.store->load(walk.saves.content, std::span(&segment, 1), 7); });
  }
}

const Field kByte{"action", 1, 1, Kind::integer};

void files_of_several_blocks() {
  const Layout layout({"observation", 99'991, 1, Kind::integer}, {kByte}, 1);
  const Ids capacities{70, 10}, task_ids{0, 1};
  ReplayStore store(layout, capacities, task_ids, 0, false), other(layout, capacities, task_ids, 1, false);
  Rows rows(layout, 2);
  for (int step = 0; step < 90; ++step) {
    rows.observations = rows.successors;
    std::ranges::fill(rows.successors[0], static_cast<std::byte>(step));
    rows.rewards = {static_cast<float>(step), 0.5f};
    rows.truncated = {step % 7 == 0, step % 5 == 0};
    store.add(rows.columns());
  }
  Saves saves;
  saves.write(store, true);
  check(saves.segments[0].table.checksums.size() == 3, "a segment has a checksum for each 4 MB");
  flip(saves.segments[0].file, 5'000'000);
  check_refuses([&] { saves.load(other, 0); }, "block 1 differs");
  check(other.size() == 0, "a refusal changes nothing");
  flip(saves.segments[0].file, 5'000'000);
  saves.load(other, 0);
  Batch batch(layout, 30), same(layout, 30);
  store.sample({3, 0.9, {}, {}}, 2, 15, batch.columns());
  other.sample({3, 0.9, {}, {}}, 2, 15, same.columns());
  check(batch == same, "rows across the edges of blocks are read back");
  const std::uint64_t all[] = {0, 0};
  check_refuses<std::system_error>([&] { (void)store.write_segment(-1, all); }, "cannot write replay rows");
}

void not_finite_values_in_files_are_refused() {
  const Field observation{"observation", 8, 4, Kind::float32};
  const Layout layout(observation, {{"extra", 4, 4, Kind::float32}}, 1);
  const Ids capacities{2}, task_ids{0};
  const auto column = [](Rows& rows, int which) -> Values& {
    return which == 0 ? rows.observations[0] : which == 1 ? rows.successors[0] : rows.fields[0];
  };
  const char* const names[] = {"observations", "successors", "extra", "rewards"};
  for (int which = 0; which < 4; ++which) {
    ReplayStore store(layout, capacities, task_ids, 0, true), strict(layout, capacities, task_ids, 0, false);
    Rows row(layout, 1);
    if (which == 3) row.rewards[0] = NAN;
    if (which < 3) std::ranges::fill(column(row, which), std::byte{0xFF});
    store.add(row.columns());
    Saves saves;
    saves.write(store, true);
    check_refuses([&] { saves.load(strict, 0); }, names[which]);
    check(strict.size() == 0, "a refusal changes nothing");
    saves.load(store, 0);
    Batch one(layout, 1);
    store.read(Ids{0}, {1, 1.0, {}, {}}, one.columns());
    check(which == 3 ? std::isnan(one.rewards[0])
                     : one.observations == row.observations && one.next_observations == row.successors &&
                           one.fields == row.fields,
          "who allows them loads them");
  }
}

int run() {
  try {
    checksums_are_crc32c();
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      damaged_files_change_nothing(seed);
      tables_that_lie_change_nothing(seed);
      forged_files_change_nothing(seed);
    }
    files_of_several_blocks();
    not_finite_values_in_files_are_refused();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
  std::puts("replay files: all checks passed");
  return 0;
}

}  // namespace
}  // namespace brc::test

int main() {
  return brc::test::run();
}
