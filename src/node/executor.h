// A few threads for what would hold up the event loop: reading sealed memory back, writing marker files.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "os/fd.h"

namespace sp {

// Owned by the event loop; only the jobs run elsewhere. The destructor lets running jobs finish, drops waiting ones and joins.
class Executor {
 public:
  using Completion = std::function<void()>;   // Runs on the event loop, from RunCompletions.
  using Job = std::function<Completion()>;    // Runs on a thread of the executor.

  // The threads take no signals, if the caller has blocked them before.
  // `yielding`: the threads wait for everybody else on this machine (YieldToOthers).
  static Result<std::unique_ptr<Executor>> Create(uint32_t threads, size_t waiting_max, bool yielding = false);
  ~Executor();

  // False, and nothing happens, when `waiting_max` jobs wait already. Of the `large` ones, which take much memory, one runs at a time, and every other
  // job that waits is taken in between.
  [[nodiscard]] bool Submit(Job job, bool large = false);
  int fd() const { return wake_.fd(); }  // Readable: call RunCompletions.
  void RunCompletions();

 private:
  Executor(EventFd wake, size_t waiting_max) : wake_(std::move(wake)), waiting_max_(waiting_max) {}
  void Run();
  bool TakesLarge() const { return !waiting_large_.empty() && !large_runs_ && (waiting_.empty() || !large_was_last_); }

  EventFd wake_;
  const size_t waiting_max_;
  std::mutex mutex_;  // Guards those below, but for the threads.
  std::condition_variable changed_;
  std::deque<Job> waiting_, waiting_large_;
  bool large_runs_ = false, large_was_last_ = false;
  std::vector<Completion> done_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sp
