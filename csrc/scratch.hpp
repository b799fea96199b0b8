// Memory of a thread for the inside of a kernel.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace brc {

// It grows to what was asked for last; 64 bytes are aligned.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  float* floats(std::int64_t count) {
    if (count > count_) {
      std::free(memory_);
      count_ = (count + 15) / 16 * 16;
      memory_ = std::aligned_alloc(64, static_cast<std::size_t>(count_) * sizeof(float));
      if (memory_ == nullptr) std::abort();  // kernels have no other way to say so
    }
    return static_cast<float*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  std::int64_t count_ = 0;
};

}  // namespace brc
