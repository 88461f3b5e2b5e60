// A few threads that run tasks in order of arrival. Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace sp {

// Threads start when they are first needed, block all signals (those are for the trainer's threads) and are joined by Stop. Not usable in
// a forked child, where the threads do not exist; its owner checks that.
class TaskPool {
 public:
  TaskPool(size_t threads_max, size_t tasks_max) : threads_max_(threads_max), tasks_max_(tasks_max) {
    threads_.reserve(threads_max);  // A thread that runs already must find its place.
  }
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;
  ~TaskPool() { Stop(); }

  // kLimit: `tasks_max` are waiting or running, or no thread can be started. kClosed: stopped. After an exception nothing was added. A task
  // may throw std::bad_alloc, which nobody is told.
  Status Add(std::function<void()> task);
  // Waits until no task waits or runs; false when `deadline` (absolute) passes first.
  bool WaitIdle(Nanos deadline);
  // Runs what was added, then ends the threads. Not to be called by a task.
  void Stop();

 private:
  void Loop();

  const size_t threads_max_;
  const size_t tasks_max_;
  std::mutex mutex_;  // Guards everything below.
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::deque<std::function<void()>> tasks_;
  size_t running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Starts a thread with all signals blocked. kLimit when the system has none left.
Result<std::thread> StartThread(std::function<void()> body);

}  // namespace sp
