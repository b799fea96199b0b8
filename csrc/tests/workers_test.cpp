// Every item is done once, by any number of threads, from several callers at a time, and after a fork.
#include "workers.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void each_once(std::int64_t items) {
  std::vector<std::atomic<int>> done(static_cast<std::size_t>(items));
  const auto function = [&](std::int64_t item) { done[static_cast<std::size_t>(item)].fetch_add(1); };
  brc::share(items, brc::Work(function));
  for (const auto& count : done) expect(count.load() == 1, "every item once, and before share returns");
}

// Small jobs one after the other, where a worker may still be looking at the last one.
void many_jobs() {
  for (int job = 0; job < 20000; ++job) each_once(1 + job % 7);
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) callers.emplace_back(many_jobs);
  for (std::thread& caller : callers) caller.join();
}

[[maybe_unused]] void after_a_fork() {
  const pid_t child = fork();
  if (child == 0) {
    each_once(100);
    _exit(0);
  }
  int status = 1;
  expect(waitpid(child, &status, 0) == child && status == 0, "a forked process works on");
  each_once(100);
}

}  // namespace

int main() {
  each_once(10);  // alone
  brc::set_threads(0);
  expect(brc::threads() == 1, "one thread at least");
  brc::set_threads(4);
  each_once(1000);
  many_jobs();
  brc::set_threads(2);
  several_callers();
#if !defined(__SANITIZE_THREAD__)
  after_a_fork();
#endif
  std::puts("workers: all checks passed");
}
