// A lock for readers and writers in which neither waits for ever.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>

namespace brc {

/// Readers side by side, or one writer. Who comes while a writer waits lets that one in first, and a writer
/// that leaves lets in the readers that wait: a writer waits for the readers that are in and for the writers
/// that came before it. (std::shared_mutex lets readers in as long as one is inside, and a writer may wait
/// for ever.) Not recursive. For std::unique_lock and std::shared_lock.
///
/// Only so many readers are in at once as there are cores, in the order in which they come. More would take
/// turns on the cores while a writer waits for the slowest; so a reader waits for one writer per `places`
/// readers before it.
class FairLock {
 public:
  explicit FairLock(std::uint64_t places = std::max(1u, std::thread::hardware_concurrency()))
      : places_(places) {}

  void lock() {
    std::unique_lock own(mutex_);
    writers_.wait(own, [this, turn = arrived_++] { return left_ == turn && reading_ == 0; });
  }
  /// Waits for readers alone: false at once where another writer is in, or waits.
  bool lock_if_first() {
    std::unique_lock own(mutex_);
    if (arrived_ != left_) return false;
    ++arrived_;
    writers_.wait(own, [this] { return reading_ == 0; });
    return true;
  }
  void unlock() {
    {
      const std::lock_guard own(mutex_);
      ++left_;
      admit();
    }
    writers_.notify_all();
    readers_.notify_all();
  }
  void lock_shared() {
    std::unique_lock own(mutex_);
    const std::uint64_t turn = readers_arrived_++;
    if (arrived_ == left_) admit();
    readers_.wait(own, [this, turn] { return turn < admitted_; });
  }
  void unlock_shared() {
    bool writer;
    {
      const std::lock_guard own(mutex_);
      --reading_;
      writer = arrived_ != left_;
      if (writer && reading_ > 0) return;
      if (!writer && !admit()) return;
    }
    (writer ? writers_ : readers_).notify_all();
  }
  /// Writers, the one that is in among them, and readers that wait: so that a test knows who has come.
  [[nodiscard]] std::pair<std::uint64_t, std::uint64_t> queued() {
    const std::lock_guard own(mutex_);
    return {arrived_ - left_, readers_arrived_ - admitted_};
  }

 private:
  /// Lets readers in that wait, as far as there are places; whether there were any.
  bool admit() {
    const std::uint64_t more = std::min(readers_arrived_ - admitted_, places_ - reading_);
    admitted_ += more;
    reading_ += more;
    return more > 0;
  }

  const std::uint64_t places_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable writers_, readers_;
  std::uint64_t arrived_ = 0, left_ = 0;              // writers, who take their turns in this order
  std::uint64_t readers_arrived_ = 0, admitted_ = 0;  // readers, likewise
  std::uint64_t reading_ = 0;                         // of those admitted, who have not left
};

}  // namespace brc
