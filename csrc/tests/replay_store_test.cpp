// ReplayStore, its files and DeviceIndex against a list of transitions, for builds with sanitizers (make
// sanitize).
#include "replay_store.hpp"

#include <cmath>
#include <cstdio>
#include <limits>

#include "finite.hpp"
#include "replay_walk.hpp"

namespace brc::test {
namespace {

// Salmon et al. 2011, the known answers of their library Random123.
using Block = std::array<std::uint32_t, 4>;
static_assert(philox4x32({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
              Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

/// Random lives; an error names the one that it ended.
void agrees_with_a_list(std::uint64_t lives) {
  for (std::uint64_t seed = 0; seed < lives; ++seed) {
    Walk walk(seed);
    for (int step = 0; step < 50; ++step) {
      try {
        walk.step();
      } catch (const std::exception& error) {
        throw std::logic_error(error.what() + (", seed " + to_string(seed)) + ", step " + to_string(step));
      }
    }
  }
}

const Field kByte{"action", 1, 1, Kind::integer};

void grows_past_one_block_of_side_slots() {
  const Layout layout({"observation", 4, 4, Kind::integer}, {kByte}, 1);
  const Ids capacities{60'000}, ids{0};
  ReplayStore store(layout, capacities, ids, 0, false);
  Rows row(layout, 1);
  row.terminated[0] = 1;
  const auto number = [](std::int32_t value) {
    const auto bytes = std::as_bytes(std::span(&value, 1));
    return Values(bytes.begin(), bytes.end());
  };
  for (std::int32_t step = 0; step < 120'000; ++step) {
    row.successors[0] = number(step);
    store.add(row.columns());
  }
  Batch one(layout, 1);
  for (std::int32_t step = 60'000; step < 120'000; step += 997) {
    store.read(Ids{step}, {1, 1.0, {}, {}}, one.columns());
    check(one.next_observations[0] == number(step), "successors in any block are kept");
  }
  check(store.side_size() == 60'000, "slots are used again");
}

/// A megabyte of these is 17 rows, so that others could come in between.
void an_extend_of_megabytes_is_many_adds() {
  const Layout layout({{{"large", 60'001, 1, Kind::integer}, 1}, {{"small", 8, 4, Kind::float32}, 2}},
                      {kByte});
  for (const std::int64_t capacity : {9, 40, 200}) {
    const Ids capacities{capacity}, task_ids{0, 0}, one{1};
    ReplayStore store(layout, capacities, task_ids, 0, false), twin(layout, capacities, task_ids, 0, false);
    Random random(0);
    Parts successor = random.values(layout.parts);
    for (const std::size_t count : {1, 16, 17, 18, 51, 70}) {
      Rows rows(layout, count);
      for (std::size_t i = 0; i < count; ++i) {
        Transition transition{successor, {Values(1)}, 0.5f, i % 17 == 16, i % 11 == 10, successor};
        if (i % 5 == 2) transition.observation[1] = random.values(layout.parts[1].field);
        std::ranges::fill(transition.successor[0], static_cast<std::byte>(i + count));
        successor = transition.successor;
        rows.set(i, transition);
        Rows row(layout, 1);
        row.set(0, transition);
        twin.add(one, row.columns());
      }
      store.extend(1, rows.columns());
      const Ids names = store.indices();
      Batch batch(layout, names.size()), expected = batch;
      store.read(names, {3, 0.9, {}, {}}, batch.columns());
      twin.read(names, {3, 0.9, {}, {}}, expected.columns());
      check(names == twin.indices() && batch == expected, "an extend is many adds");
    }
  }
}

/// What was gathered ahead is void once other content with the same numbers takes its place.
void replaced_content_is_gathered_anew() {
  const Layout layout({"observation", 1, 1, Kind::integer}, {kByte}, 1);
  const Ids capacities{4}, task_ids{0};
  for (const bool adopts : {false, true}) {
    ReplayStore store(layout, capacities, task_ids, 0, false), other(layout, capacities, task_ids, 0, false);
    Rows row(layout, 1);
    for (int step = 0; step < 4; ++step) store.add(row.columns());
    row.fields[0][0] = std::byte{1};
    for (int step = 0; step < 4; ++step) other.add(row.columns());
    const Request request(1, 1.0, {}, {});
    Batch batch(layout, 3), expected(layout, 3);
    Ahead ahead;
    store.gather_ahead(request, 0, 1, 3, batch.columns(), ahead);
    if (adopts) {
      Device device(layout, capacities, task_ids, 0);
      device.take(other);
      device.give(store);
    } else {
      Saves saves;
      saves.write(other, true);
      saves.load(store, 0);
    }
    check(store.settle(request, 1, 3, batch.columns(), ahead) == 3, "all of it is gathered anew");
    other.sample(request, 1, 3, expected.columns());
    check(batch == expected, "none of the content before is left");
  }
}

void refusals_change_nothing(std::uint64_t seed) {
  Walk walk(seed);
  for (int step = 0; step < 12; ++step) walk.add();
  const auto streams = static_cast<std::int64_t>(walk.task_ids.size());
  const auto tasks = static_cast<std::int64_t>(walk.capacities.size());
  Rows one(walk.layout, 1), two(walk.layout, 2);
  const auto add = [&](const Ids& ids, const Rows& rows) {
    return [&, ids] { walk.store->add(ids, rows.columns()); };
  };
  walk.check_unchanged("streams must lie in", add({streams}, one));
  walk.check_unchanged("streams must lie in", add({0, -1}, two));
  walk.check_unchanged("streams must differ, got 0 twice", add({0, 0}, two));
  const std::string first = walk.layout.parts[0].field.name + " must hold";
  walk.check_unchanged(first, add({0}, two));
  walk.check_unchanged(first, [&] { walk.store->add(Rows(walk.layout, 99).columns()); });
  const auto short_by_one = [&](const std::string& words, const auto& column) {
    Rows rows(walk.layout, 1);
    column(rows).pop_back();
    walk.check_unchanged(words, add({0}, rows));
    if (rows.successors[0].empty()) return;  // which extend takes for none given
    walk.check_unchanged(words, [&] { walk.store->extend(0, rows.columns()); });
  };
  short_by_one(walk.layout.fields[0].name + " must hold", [](Rows& rows) -> auto& { return rows.fields[0]; });
  for (std::size_t p = 0; p < walk.layout.parts.size(); ++p) {
    const std::string& name = walk.layout.parts[p].field.name;
    short_by_one(name + " must hold", [p](Rows& rows) -> auto& { return rows.observations[p]; });
    short_by_one("as " + name, [p](Rows& rows) -> auto& { return rows.successors[p]; });
  }
  short_by_one("terminated must hold", [](Rows& rows) -> auto& { return rows.terminated; });
  short_by_one("truncated must hold", [](Rows& rows) -> auto& { return rows.truncated; });
  for (const std::int64_t stream : {streams, std::int64_t{-1}}) {
    const std::string words = "stream must lie in 0.." + to_string(streams - 1);
    walk.check_unchanged<std::out_of_range>(words, [&] { walk.store->extend(stream, one.columns()); });
    walk.check_unchanged<std::out_of_range>(words, [&] { (void)walk.store->discard_episode(stream); });
  }
  walk.check_unchanged("streams must differ", [&] { walk.store->reset(Ids{0, 0}); });
  walk.check_unchanged("streams must lie in", [&] { walk.store->reset(Ids{0, streams}); });
  const auto sample = [&](const Request& request, std::size_t batch_size, std::size_t rows) {
    return [&, request, batch_size, rows] {
      walk.store->sample(request, 1, batch_size, Batch(walk.layout, rows).columns());
    };
  };
  walk.check_unchanged(first, sample({1, 1.0, {}, {}}, 1, 2));
  walk.check_unchanged("batch_size must lie in", sample({1, 1.0, {}, {}}, 0, 0));
  walk.check_unchanged("transitions stored", sample({1, 1.0, {}, {}}, 999, 999));
  walk.check_unchanged("tasks must lie in", sample({1, 1.0, {tasks}, {}}, 1, 1));
  walk.check_unchanged("tasks must differ", sample({1, 1.0, {0, 0}, {}}, 1, 1));
  walk.check_unchanged("weights must hold one share", sample({1, 1.0, {0}, {1.0, 1.0}}, 1, 1));
  const auto prioritize = [&](const Ids& names, const std::vector<float>& priorities) {
    return [&, names, priorities] { walk.store->set_priorities(names, priorities); };
  };
  const std::int64_t known = walk.store->indices()[0];
  if (walk.alpha) {
    walk.check_unchanged("weights must hold", [&] {
      walk.store->sample({1, 1.0, {}, {}, 0.5}, 1, 1, Batch(walk.layout, 1).columns());
    });
    walk.check_unchanged("priorities must hold", prioritize({known}, {}));
    for (const float value : {-1.0f, INFINITY, NAN}) {
      walk.check_unchanged("priorities must be finite and not negative",
                           prioritize({known, known}, {9.0f, value}));
    }
    for (const std::int64_t none : {std::int64_t{-1}, 99 * streams}) {
      walk.check_unchanged<std::out_of_range>("of no transition that was added",
                                              prioritize({known, none}, {9.0f, 9.0f}));
    }
  } else {
    walk.check_unchanged("made with alpha", prioritize({known}, {1.0f}));
    walk.check_unchanged("made with alpha", [&] {
      walk.store->sample({1, 1.0, {}, {}, 0.5}, 1, 1, Batch(walk.layout, 1, true).columns());
    });
  }
  const auto read = [&](const Ids& names, const auto& column) {
    return [&, names, column] {
      Batch batch(walk.layout, 1);
      column(batch).pop_back();
      walk.store->read(names, {1, 1.0, {}, {}}, batch.columns());
    };
  };
  const Ids name{walk.store->indices()[0]};
  walk.check_unchanged("steps must hold", read(name, [](Batch& batch) -> auto& { return batch.steps; }));
  walk.check_unchanged("indices must hold", read(name, [](Batch& batch) -> auto& { return batch.indices; }));
  walk.check_unchanged("terminated must hold",
                       read(name, [](Batch& batch) -> auto& { return batch.terminated; }));
  walk.check_unchanged("truncated must hold",
                       read(name, [](Batch& batch) -> auto& { return batch.truncated; }));
  walk.check_unchanged("must hold",
                       read(name, [](Batch& batch) -> auto& { return batch.next_observations.back(); }));
  walk.step();
}

void unusable_arguments_are_refused() {
  const Field observation{"observation", 4, 4, Kind::float32};
  const auto make = [&](const Ids& capacities, const Ids& task_ids, std::size_t stack = 1) {
    return [&, capacities, task_ids, stack] {
      const ReplayStore store(Layout(observation, {kByte}, stack), capacities, task_ids, 0, false);
    };
  };
  check_refuses(make({0}, {0}), "capacity must be at least 1, got 0");
  check_refuses(make({1 << 30}, {0}), "capacity must be at most");
  check_refuses(make({}, {}), "at least one task");
  check_refuses(make({1}, {}), "at least one stream");
  check_refuses(make({1}, {1}), "task_ids must lie in 0..0, got 1");
  check_refuses(make({1, 1}, {0}), "none is 1");
  check_refuses(make({1}, {0}, 0), "stack must be at least 1");
  check_refuses(make({1 << 29}, {0}), "rows, and a store has at most");
  check_refuses([&] { Layout(std::vector<Part>{}, {kByte}); }, "1 to 16 parts, got 0");
  check_refuses([&] { Layout(std::vector(17, Part{observation, 1}), {kByte}); }, "1 to 16 parts, got 17");
  check_refuses([&] { Layout(observation, {}, 1); }, "1 to 16 fields");
  check_refuses([&] { Layout(observation, std::vector(17, kByte), 1); }, "1 to 16 fields");
  check_refuses([&] { Layout(observation, {{"action", 0, 1, Kind::integer}}, 1); }, "action must have 1 to");
  check_refuses([] { Request(0, 1.0, {}, {}); }, "n_step must be at least 1");
  check_refuses([] { Request(1, 1.5, {}, {}); }, "discount must lie in");
  check_refuses([] { Request(1, 1.0, {}, {-1.0}); }, "not negative");
  check_refuses([] { Request(1, 1.0, {}, {0.0}); }, "positive, finite sum");
  check_refuses([] { Request(1, 1.0, {}, {}, 1.5); }, "beta must lie in");
  check_refuses([] { Request(1, 1.0, {0}, {}, 0.5); }, "leave out tasks and weights");
}

using Bits = std::vector<std::uint32_t>;

struct Floats {
  Kind kind;
  std::size_t item;
  Bits finite, not_finite;  // the largest and smallest ones; NaN and infinity
};
const Floats kFloats[] = {
    {Kind::float16, 2, {0x7BFF, 0xFBFF, 0x0001, 0x8000}, {0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF}},
    {Kind::bfloat16, 2, {0x7F7F, 0xFF7F, 0x7C00, 0x0001}, {0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF}},
    {Kind::float32,
     4,
     {0x7F7FFFFF, 0xFF7FFFFF, 0x7C007C00, 0x00000001},
     {0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF}},
};

void not_finite_values_are_found() {
  for (const Floats& floats : kFloats) {
    for (std::size_t count = 0; count < 70; ++count) {
      Values values(1 + count * floats.item);  // at an odd address
      const auto put_at = [&](std::size_t i, std::uint32_t bits) {
        std::memcpy(values.data() + 1 + i * floats.item, &bits, floats.item);
      };
      const Bytes all = Bytes(values).subspan(1);
      for (std::size_t i = 0; i < count; ++i) put_at(i, floats.finite[i % floats.finite.size()]);
      check(first_not_finite(all, floats.kind) == count, "finite values of any size are finite");
      for (std::size_t i = count; i-- > 0;) {
        put_at(i, floats.not_finite[i % floats.not_finite.size()]);
        check(first_not_finite(all, floats.kind) == i, "the first value that is not finite is found");
        check(!std::isfinite(value_at(all, floats.kind, i)), "its value can be named");
        check(first_not_finite(all, Kind::integer) == all.size(), "integers are always finite");
      }
    }
  }
}

/// A transition of one stream with one value that is not finite, in each of its columns in turn.
void not_finite_values_are_refused(const Floats& floats, std::size_t items, std::size_t parts) {
  const Field observation{"observations", items * floats.item, floats.item, floats.kind};
  std::vector<Part> all{{observation, 1}};
  if (parts == 2) {  // one has a gap before the other, whatever the item
    all = {{{"part1", 3 * floats.item, floats.item, floats.kind}, 1},
           {{"byte", 1, 1, Kind::integer}, 2},
           {{"part2", observation.bytes, floats.item, floats.kind}, 3}};
  }
  const Layout layout(all, {kByte, {"extra", observation.bytes, floats.item, floats.kind}});
  const Ids capacities{3}, task_ids{0, 0};
  ReplayStore store(layout, capacities, task_ids, 0, false), lenient(layout, capacities, task_ids, 0, true);
  Rows clean(layout, 2);
  Rows rows = clean;
  const auto refused = [&](const std::string& name, auto& column, std::size_t i, const auto& value) {
    std::memcpy(&column[column.size() / 2 + i], &value, sizeof(value));
    check_refuses([&] { store.add(rows.columns()); }, name + " of stream 1 (task 0) must be finite");
    check_refuses([&] { store.extend(0, rows.columns()); }, " in row 1 of stream 0 (task 0) must be finite");
    lenient.add(rows.columns());
    rows = clean;
  };
  const auto refused_bits = [&](std::size_t i, const auto& value) {
    for (std::size_t p = 0; p < layout.parts.size(); ++p) {
      const Field& field = layout.parts[p].field;
      if (field.kind == Kind::integer || i >= field.bytes) continue;
      refused(field.name, rows.observations[p], i, value);
      refused(parts == 1 ? "successors" : "successors of " + field.name, rows.successors[p], i, value);
    }
    refused("extra", rows.fields[1], i, value);
  };
  for (int round = 0; round < 4; ++round) {
    for (std::size_t i = 0; i < observation.bytes; i += floats.item) {
      for (const std::uint32_t bits : floats.not_finite) {
        if (floats.item == 4) refused_bits(i, bits);
        if (floats.item == 2) refused_bits(i, static_cast<std::uint16_t>(bits));
      }
    }
    for (const float reward : {INFINITY, -INFINITY, NAN}) refused("rewards", rows.rewards, 0, reward);
    check(store.size() == static_cast<std::size_t>(std::min(2 * round, 4)), "nothing of them was stored");
    store.add(clean.columns());
  }
  check(lenient.size() == 4, "who allows them keeps them");
}

int run() {
  try {
    agrees_with_a_list(60);
    grows_past_one_block_of_side_slots();
    an_extend_of_megabytes_is_many_adds();
    replaced_content_is_gathered_anew();
    for (std::uint64_t seed = 0; seed < 10; ++seed) refusals_change_nothing(seed);
    unusable_arguments_are_refused();
    not_finite_values_are_found();
    for (const Floats& floats : kFloats) {
      for (const std::size_t items : {1, 3, 8, 16, 19}) {
        for (const std::size_t parts : {1, 2}) not_finite_values_are_refused(floats, items, parts);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
  std::puts("replay store: all checks passed");
  return 0;
}

}  // namespace
}  // namespace brc::test

int main() {
  return brc::test::run();
}
