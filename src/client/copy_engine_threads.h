// The few threads of a copy engine.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>

namespace sp {

inline constexpr int kCopyThreadsMax = 64;

// min(2, the cores that this rank owns): with two, a copy is bound by memory, and training keeps the other cores. Cores that all processes of
// the machine may use are shared by the ranks that torchrun has started there (LOCAL_WORLD_SIZE).
int DefaultCopyThreads();

// Starts threads on first use, keeps them, joins them when it goes. Thread-safe: a call that finds the threads taken by
// another one works alone. In a forked child, where the threads do not exist, every call works alone.
class CopyThreads {
 public:
  CopyThreads();
  ~CopyThreads();
  CopyThreads(const CopyThreads&) = delete;
  CopyThreads& operator=(const CopyThreads&) = delete;

  // Runs `work` on the calling thread and on up to threads - 1 others at once; returns when all of them have returned
  // from it. `work` must be able to do everything by itself: nothing promises that another thread joins. It must not
  // throw, and not use this object.
  void Run(int threads, const std::function<void()>& work);

 private:
  struct State;
  std::unique_ptr<State> state_;
  pid_t owner_;
};

}  // namespace sp
