// A ReplayStore whose allocations fail one after the other, or whose arguments change while it allocates, as
// those that several processes share may.
#include <cstdio>
#include <cstdlib>
#include <new>

#include "replay_walk.hpp"

namespace {

using Hook = std::function<void()>;
Hook* on_allocation = nullptr;

}  // namespace

// Not inlined: GCC takes the parts of an inlined pair for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  if (Hook* const hook = std::exchange(on_allocation, nullptr)) {
    (*hook)();  // may allocate
    on_allocation = hook;
  }
  if (void* const data = std::malloc(std::max<std::size_t>(bytes, 1))) return data;
  throw std::bad_alloc();
}

[[gnu::noinline]] void operator delete(void* data) noexcept {
  std::free(data);
}

[[gnu::noinline]] void operator delete(void* data, std::size_t) noexcept {
  std::free(data);
}

namespace brc::test {
namespace {

/// Runs a hook at every allocation of a call.
template <class Call>
void with(Hook hook, const Call& call) {
  on_allocation = &hook;
  try {
    call();
  } catch (...) {
    on_allocation = nullptr;
    throw;
  }
  on_allocation = nullptr;
}

/// Makes a call whose first allocation fails, then one whose second does, and so on until none fails.
template <class Call, class Check>
void fail_each(const Call& call, const Check& after) {
  for (int allowed = 0;; ++allowed) {
    int left = allowed;
    const auto fail = [&left] {
      if (left-- == 0) throw std::bad_alloc();
    };
    try {
      with(fail, call);
    } catch (const std::bad_alloc&) {
      after();
      continue;
    }
    return;
  }
}

void failures_change_nothing(std::uint64_t seed) {
  Walk walk(seed);
  for (int step = 0; step < 20; ++step) {
    Rows rows(walk.layout, walk.task_ids.size());
    Ids ids(walk.task_ids.size());
    std::vector<Transition> transitions;
    for (std::size_t s = 0; s < ids.size(); ++s) {
      ids[s] = static_cast<std::int64_t>(s);
      rows.set(s, transitions.emplace_back(walk.any(s)));
    }
    const TransitionColumns columns = rows.columns();
    fail_each([&] { walk.store->add(ids, columns); }, [&] { walk.check_transitions(*walk.store); });
    for (std::size_t s = 0; s < ids.size(); ++s) walk.list->add(s, std::move(transitions[s]));
    walk.check_transitions(*walk.store);

    const Ids one{static_cast<std::int64_t>(walk.any_stream())};
    const auto unchanged = [&] { walk.check_transitions(*walk.store); };
    Rows many(walk.layout, walk.random.below(40));
    List after = *walk.list;
    for (std::size_t i = 0; i < many.rewards.size(); ++i) {
      const Transition transition = walk.any(0);
      many.set(i, transition);
      after.add(static_cast<std::size_t>(one[0]), transition);
    }
    const TransitionColumns more = many.columns();
    fail_each([&] { walk.store->extend(one[0], more); }, unchanged);
    walk.list = after;
    fail_each([&] { walk.store->reset(one); }, unchanged);
    walk.list->reset(one);
    walk.check_transitions(*walk.store);
    const Ids names = walk.store->indices();
    Batch read(walk.layout, names.size()), whole = read;
    const BatchColumns to = read.columns();
    fail_each([&] { walk.store->read(names, {1, 1.0, {}, {}}, to); }, unchanged);
    for (std::size_t i = 0; i < names.size(); ++i) walk.list->read(names[i], {1, 1.0, {}, {}}, i, whole);
    check(read == whole, "the next try reads all");
    const std::uint64_t drawn = walk.store->draws();
    fail_each([&] { (void)walk.store->sequences(4, 1); },
              [&] { check(walk.store->draws() == drawn, "sequences that nobody got do not count"); });

    std::vector<float> priorities;
    for (std::size_t i = 0; i < names.size(); ++i)
      priorities.push_back(static_cast<float>(walk.random.below(5)));
    if (walk.alpha) {
      fail_each([&] { walk.store->set_priorities(names, priorities); }, unchanged);
      for (std::size_t i = 0; i < names.size(); ++i) walk.list->prioritize(names[i], priorities[i]);
    }

    const Request request = walk.any_request();
    if (!walk.list->serves(request, 3)) continue;
    Batch batch(walk.layout, 6, request.beta.has_value()), expected = batch;
    const BatchColumns out = batch.columns();
    const std::uint64_t draw = walk.store->draws();
    fail_each([&] { walk.store->sample(request, 2, 3, out); },
              [&] { check(walk.store->draws() == draw, "a batch that nobody got does not count"); });
    for (std::size_t u = 0; u < 2; ++u) {
      walk.list->sample(request, walk.store->seed(), draw + u, 3 * u, 3, expected);
    }
    Walk::check_drawn(batch, expected);
  }
  walk.saves.write(*walk.store, true);
  const auto load = [&] { walk.saves.load(*walk.store, seed); };
  fail_each(load, [&] {
    if (walk.store->size() > 0) walk.check_transitions(*walk.store);
  });
  walk.check_transitions(*walk.store);
}

const Layout kPlain({"observation", 4, 4, Kind::integer}, {{"action", 1, 1, Kind::integer}}, 1);

void arguments_that_change_spoil_no_memory() {
  const Ids capacities{64}, task_ids(32, 0);
  ReplayStore ending(kPlain, capacities, task_ids, 0, false), leaving(kPlain, capacities, task_ids, 0, false);
  Rows rows(kPlain, 32), two(kPlain, 2);
  rows.terminated[0] = 1;
  const TransitionColumns columns = rows.columns();
  with([&] { std::ranges::fill(rows.terminated, 1); }, [&] { ending.add(columns); });
  check(ending.size() == 32 && ending.side_size() <= ending.slots(), "ends are counted as they are stored");

  Ids ids{0, 1};
  const TransitionColumns other = two.columns();
  leaving.add(ids, other);
  two.terminated = {1, 1};
  with([&] { ids[1] = 1'000'000; }, [&] { leaving.add(ids, other); });
  check(leaving.sizes()[0] == 2 && leaving.sizes()[1] == 2, "streams are those that were checked");
}

int run() {
  try {
    for (std::uint64_t seed = 0; seed < 12; ++seed) failures_change_nothing(seed);
    arguments_that_change_spoil_no_memory();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
  std::puts("replay memory: all checks passed");
  return 0;
}

}  // namespace
}  // namespace brc::test

int main() {
  return brc::test::run();
}
