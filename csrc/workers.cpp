#include "workers.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

namespace brc {
namespace {

// A worker that has run out of items looks for more this long before it sleeps: the next call comes within
// microseconds, and to wake it takes some tens of them.
constexpr auto AWAKE = std::chrono::microseconds(30);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// One job at a time. `left` holds the job's number above, and below how many of its items nobody has taken:
// whoever takes one by compare-and-swap knows that its job is not over, and may read what belongs to it.
class Pool {
 public:
  void run(std::int64_t items, const Work& work, int wanted) {
    const std::unique_lock alone(busy_, std::try_to_lock);
    if (!alone.owns_lock()) {
      for (std::int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    grow(wanted - 1);
    work_ = &work;
    items_ = static_cast<std::uint32_t>(items);
    done_.store(0, std::memory_order_relaxed);
    const int places = static_cast<int>(std::min<std::int64_t>(wanted, items)) - 1;
    places_.store(places, std::memory_order_relaxed);
    const std::uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    left_.store(static_cast<std::uint64_t>(job) << 32 | static_cast<std::uint32_t>(items),
                std::memory_order_release);
    job_.store(job, std::memory_order_release);
    if (places >= started_) {
      job_.notify_all();
    } else {
      for (int place = 0; place < places; ++place) job_.notify_one();
    }
    take(job);
    wait_for(static_cast<std::uint32_t>(items));
  }

 private:
  void grow(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // those that there are do it
      }
    }
  }

  // Items of this job until there are none.
  void take(std::uint32_t job) {
    std::uint64_t left = left_.load(std::memory_order_acquire);
    while (static_cast<std::uint32_t>(left >> 32) == job && static_cast<std::uint32_t>(left) > 0) {
      if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      const std::uint32_t items = items_;
      (*work_)(items - static_cast<std::uint32_t>(left));
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items) done_.notify_one();
      left = left_.load(std::memory_order_acquire);
    }
  }

  void wait_for(std::uint32_t items) {
    const auto until = std::chrono::steady_clock::now() + AWAKE;
    std::uint32_t done = done_.load(std::memory_order_acquire);
    while (done != items) {
      if (std::chrono::steady_clock::now() < until) {
        pause();
      } else {
        done_.wait(done, std::memory_order_acquire);
      }
      done = done_.load(std::memory_order_acquire);
    }
  }

  void serve() {
    std::uint32_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      std::uint32_t job = job_.load(std::memory_order_acquire);
      while (job == seen) {
        if (std::chrono::steady_clock::now() < until) {
          pause();
        } else {
          job_.wait(seen, std::memory_order_acquire);
        }
        job = job_.load(std::memory_order_acquire);
      }
      seen = job;
      // of a later job's places one may be lost here: it is done by fewer
      if (places_.fetch_sub(1, std::memory_order_relaxed) > 0) take(job);
    }
  }

  std::mutex busy_;
  const Work* work_ = nullptr;
  std::uint32_t items_ = 0;
  int started_ = 0;
  std::atomic<int> places_ = 0;  // for workers in this job
  alignas(64) std::atomic<std::uint32_t> job_ = 0;
  alignas(64) std::atomic<std::uint64_t> left_ = 0;
  alignas(64) std::atomic<std::uint32_t> done_ = 0;
};

std::atomic<int> wanted = 1;
std::atomic<Pool*> pool = nullptr;

// Never deleted: its threads end with the process. A forked child has none of them, and starts its own.
Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  return *pool.load();
}

}  // namespace

void set_threads(int count) {
  wanted.store(std::max(1, count), std::memory_order_relaxed);
}

int threads() {
  return wanted.load(std::memory_order_relaxed);
}

void share(std::int64_t items, const Work& work) {
  the_pool().run(items, work, threads());
}

}  // namespace brc
