// Whose turn it is in a FairLock. Nothing here waits for a time: whoever has the lock leaves it only when all
// others have come, so that the order of turns is known, and with it how many turns of others anybody waits
// for.
#include "fair_lock.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <numeric>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace brc::test {
namespace {

void check(bool holds, const std::string& rule) {
  if (!holds) throw std::logic_error(rule);
}

void wait_until(const std::function<bool()>& holds) {
  while (!holds()) std::this_thread::yield();
}

/// Readers have the numbers from 0 on, and writers those after them.
using Turns = std::vector<std::size_t>;
constexpr std::uint64_t kPlaces = 64;                   // for everybody
using Queue = std::pair<std::uint64_t, std::uint64_t>;  // of writers and readers

/// Everybody takes turn after turn as fast as the lock lets them.
Turns turns_of_a_crowd(std::size_t readers, std::size_t writers, std::size_t turns_each) {
  FairLock lock(kPlaces);
  std::mutex mutex;  // guards turns
  Turns turns;
  std::atomic<bool> over = false;
  std::size_t written = 0;  // guarded by the lock under test
  const auto take = [&](std::size_t who) {
    const std::lock_guard own(mutex);
    if (!over) turns.push_back(who);
  };
  std::vector<std::future<void>> crowd;
  for (std::size_t who = 0; who < readers + writers; ++who) {
    crowd.push_back(std::async(std::launch::async, [&, who] {
      // Whoever is left then has no crowd any more.
      const std::unique_ptr<std::atomic<bool>, void (*)(std::atomic<bool>*)> end(
          &over, [](std::atomic<bool>* ended) { *ended = true; });
      for (std::size_t turn = 0; turn < turns_each && !over; ++turn) {
        if (who < readers) {
          const std::shared_lock reading(lock);
          const std::size_t before = written;
          take(who);
          wait_until([&] { return over || lock.queued().first == writers; });
          check(written == before, "nobody writes beside a reader");
        } else {
          const std::unique_lock writing(lock);
          const std::size_t before = ++written;
          take(who);
          wait_until([&] { return over || lock.queued() == Queue{writers, readers}; });
          check(written == before, "nobody writes beside a writer");
        }
      }
    }));
  }
  for (auto& one : crowd) one.get();
  return turns;
}

void everybody_gets_a_turn_in_each_round(std::size_t readers, std::size_t writers) {
  constexpr std::size_t kTurns = 60;
  const Turns turns = turns_of_a_crowd(readers, writers, kTurns);
  const auto reads = [&](std::size_t who) { return who < readers; };
  auto at = std::ranges::find_if_not(turns, reads);  // some may come before the first writer
  std::vector<std::size_t> order;                    // of writers
  while (at != turns.end()) {
    order.push_back(*at++);
    const auto next = std::ranges::find_if_not(at, turns.end(), reads);
    if (next == turns.end()) break;  // the last round may end early
    Turns between(at, next);
    std::ranges::sort(between);
    check(between.size() == readers && std::ranges::adjacent_find(between) == between.end(),
          "each reader has one turn between two writers");
    at = next;
  }
  check(order.size() >= std::min(kTurns, turns.size() / (readers + 1)) - 1, "writers have their turns");
  for (std::size_t i = writers; i < order.size(); ++i) {
    check(order[i] == order[i - writers], "writers have their turns in the order in which they come");
  }
}

/// Those who come while one is in get their turns by kind and in order; a `writer` is in, or a reader.
void who_comes_first_is_served_first(bool writer, const std::vector<bool>& writes) {
  FairLock lock(kPlaces);
  std::mutex mutex;  // guards turns
  Turns turns;
  const auto taken = [&] {
    const std::lock_guard own(mutex);
    return turns.size();
  };
  const auto take = [&](std::size_t who) {
    const std::lock_guard own(mutex);
    turns.push_back(who);
  };
  Turns expected, readers, writers;
  std::vector<std::future<void>> others;
  const auto come = [&](std::size_t who) {
    others.push_back(std::async(std::launch::async, [&, who] {
      if (writes[who]) {
        const std::unique_lock writing(lock);
        take(who);
      } else {
        const std::shared_lock reading(lock);
        take(who);
      }
    }));
    if (!writer && !writes[who] && writers.empty()) {
      expected.push_back(who);
      wait_until([&] { return taken() == expected.size(); });  // beside the reader that is in
      return;
    }
    (writes[who] ? writers : readers).push_back(who);
    const Queue queue{writers.size() + (writer ? 1 : 0), readers.size()};
    wait_until([&] { return lock.queued() == queue || taken() > expected.size(); });
  };
  const auto all_come = [&] {
    for (std::size_t who = 0; who < writes.size(); ++who) come(who);
    check(taken() == expected.size(), "nobody gets in beside a writer, or before one that waits");
  };
  if (writer) {
    const std::unique_lock own(lock);
    all_come();
  } else {
    const std::shared_lock own(lock);
    all_come();
  }
  for (auto& other : others) other.get();
  if (!writer && !writers.empty()) {
    expected.push_back(writers[0]);
    writers.erase(writers.begin());
  }
  const auto first = static_cast<std::ptrdiff_t>(expected.size());
  const auto last = first + static_cast<std::ptrdiff_t>(readers.size());
  expected.insert(expected.end(), readers.begin(), readers.end());
  expected.insert(expected.end(), writers.begin(), writers.end());
  std::sort(turns.begin() + first, turns.begin() + last);  // they are in side by side
  check(turns == expected, "a reader waits for one writer, and a writer for those that came before it");
}

/// With fewer places than readers, those are in who came first, and a writer comes before those who wait.
void places_are_taken_in_order(std::size_t places, std::size_t readers) {
  FairLock lock(places);
  std::mutex mutex;  // guards turns
  Turns turns;
  const auto taken = [&] {
    const std::lock_guard own(mutex);
    return turns.size();
  };
  const auto take = [&](std::size_t who) {
    const std::lock_guard own(mutex);
    turns.push_back(who);
  };
  std::vector<std::promise<void>> leave(readers);
  std::vector<std::future<void>> others;
  const auto come = [&](std::size_t who) {
    others.push_back(std::async(std::launch::async, [&, who, left = leave[who].get_future()] {
      const std::shared_lock reading(lock);
      take(who);
      left.wait();
    }));
  };
  for (std::size_t who = 0; who < readers; ++who) {
    come(who);
    const std::size_t in = std::min(who + 1, places);
    wait_until([&] { return taken() == in && lock.queued() == Queue{0, who + 1 - in}; });
  }
  for (std::size_t who = 0; who + 1 < readers - places; ++who) {
    leave[who].set_value();
    wait_until([&] { return taken() == places + who + 1; });
    check(lock.queued() == Queue{0, readers - places - who - 1}, "a place that is left goes to one reader");
  }
  const std::size_t last = readers - 1;
  others.push_back(std::async(std::launch::async, [&] {
    check(lock.lock_if_first(), "who is first gets in");
    check(taken() == last, "and waits for the readers that are in");
    take(readers);
    check(!lock.lock_if_first(), "nobody is first beside a writer");
    lock.unlock();
  }));
  wait_until([&] { return lock.queued() == Queue{1, 1}; });
  check(!lock.lock_if_first(), "nobody is first who comes after a writer that waits");
  for (std::size_t who = 0; who < readers; ++who) {
    if (who + 1 >= readers - places) leave[who].set_value();
  }
  for (auto& other : others) other.get();
  Turns expected(readers - 1);
  std::iota(expected.begin(), expected.end(), 0);
  expected.insert(expected.end(), {readers, last});
  check(turns == expected, "readers are in in the order in which they come, a writer before those who wait");
}

int run() {
  try {
    for (unsigned kinds = 0; kinds < 64; ++kinds) {  // of six that come
      std::vector<bool> writes;
      for (unsigned who = 0; who < 6; ++who) writes.push_back((kinds >> who & 1u) != 0);
      for (const bool writer : {false, true}) who_comes_first_is_served_first(writer, writes);
    }
    for (const auto& [readers, writers] :
         std::initializer_list<std::pair<std::size_t, std::size_t>>{{4, 1}, {1, 4}, {3, 3}, {1, 1}}) {
      everybody_gets_a_turn_in_each_round(readers, writers);
    }
    for (const auto& [places, readers] :
         std::initializer_list<std::pair<std::size_t, std::size_t>>{{1, 2}, {1, 5}, {2, 3}, {2, 6}, {3, 7}}) {
      places_are_taken_in_order(places, readers);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
  std::puts("fair lock: all checks passed");
  return 0;
}

}  // namespace
}  // namespace brc::test

int main() {
  return brc::test::run();
}
