// A lock for readers and writers in which neither waits for ever.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace brc {

/// Readers side by side, or one writer. Who comes while a writer waits lets that one in first, and a writer
/// that leaves lets in every reader that waits: a writer waits for the readers that are in, a reader for one
/// writer. (std::shared_mutex lets readers in as long as one is inside, and a writer may wait for ever.) Not
/// recursive. For std::unique_lock and std::shared_lock.
class FairLock {
 public:
  void lock() {
    std::unique_lock own(mutex_);
    ++writers_waiting_;
    changed_.wait(own, [this] { return !writing_ && reading_ == 0; });
    --writers_waiting_;
    writing_ = true;
  }
  void unlock() {
    {
      const std::lock_guard own(mutex_);
      writing_ = false;
      reading_ += readers_waiting_;
      readers_waiting_ = 0;
      ++phase_;
    }
    changed_.notify_all();
  }
  void lock_shared() {
    std::unique_lock own(mutex_);
    if (!writing_ && writers_waiting_ == 0) {
      ++reading_;
      return;
    }
    ++readers_waiting_;  // the writer that leaves next counts this reader among those that read
    changed_.wait(own, [this, phase = phase_] { return phase_ != phase; });
  }
  void unlock_shared() {
    {
      const std::lock_guard own(mutex_);
      if (--reading_ > 0) return;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::uint64_t phase_ = 0;  // writers that have left
  std::uint64_t reading_ = 0, readers_waiting_ = 0, writers_waiting_ = 0;
  bool writing_ = false;
};

}  // namespace brc
