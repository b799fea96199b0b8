// The threads of this process that share the work of the float32 and bfloat16 kernels.
#pragma once

#include <cstdint>
#include <memory>

namespace brc {

// How many threads a call may use, the calling one included; at least 1, which is what it is at first.
void set_threads(int count);
int threads();

// A function of an item's number, as two words: what is called is the caller's and outlives the call.
class Work {
 public:
  template <typename Function>
  explicit Work(const Function& function)
      : function_(std::addressof(function)),
        call_([](const void* f, std::int64_t item) { (*static_cast<const Function*>(f))(item); }) {}
  void operator()(std::int64_t item) const { call_(function_, item); }

 private:
  const void* function_;
  void (*call_)(const void*, std::int64_t);
};

// work(item) once for each item below `items`, in any order; returns when all are done. The caller takes
// items as the others do, and waits for nobody who has taken none, so that on a busy machine it goes on
// alone. It also does so where another thread of the process has the workers. Items must not throw.
void share(std::int64_t items, const Work& work);

// As `share`, by the calling thread alone where `cost`, in operations of a vector unit, is too small to wake
// anybody for.
template <typename Function>
void for_each_item(std::int64_t items, double cost, const Function& function) {
  constexpr double WORTH_WAKING = 4e4;
  if (items < 2 || cost < WORTH_WAKING || threads() < 2) {
    for (std::int64_t item = 0; item < items; ++item) function(item);
  } else {
    share(items, Work(function));
  }
}

}  // namespace brc
