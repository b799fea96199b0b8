// A lock for readers and writers in which neither waits for ever.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>

namespace brc {

/// Readers side by side, or one writer. Who comes while a writer waits lets that one in first, and a writer
/// that leaves lets in every reader that waits: a writer waits for the readers that are in and for the
/// writers that came before it, a reader for one writer. (std::shared_mutex lets readers in as long as one is
/// inside, and a writer may wait for ever.) Not recursive. For std::unique_lock and std::shared_lock.
class FairLock {
 public:
  void lock() {
    std::unique_lock own(mutex_);
    changed_.wait(own, [this, turn = arrived_++] { return left_ == turn && reading_ == 0; });
  }
  void unlock() {
    {
      const std::lock_guard own(mutex_);
      ++left_;
      reading_ += std::exchange(readers_waiting_, 0);
    }
    changed_.notify_all();
  }
  void lock_shared() {
    std::unique_lock own(mutex_);
    if (arrived_ == left_) {
      ++reading_;
      return;
    }
    ++readers_waiting_;  // the writer that leaves next counts this reader among those that read
    changed_.wait(own, [this, before = left_] { return left_ != before; });
  }
  void unlock_shared() {
    {
      const std::lock_guard own(mutex_);
      if (--reading_ > 0) return;
    }
    changed_.notify_all();
  }
  /// Writers, the one that is in among them, and readers that wait: so that a test knows who has come.
  [[nodiscard]] std::pair<std::uint64_t, std::uint64_t> queued() {
    const std::lock_guard own(mutex_);
    return {arrived_ - left_, readers_waiting_};
  }

 private:
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::uint64_t arrived_ = 0, left_ = 0;  // writers, who take their turns in this order
  std::uint64_t reading_ = 0, readers_waiting_ = 0;
};

}  // namespace brc
