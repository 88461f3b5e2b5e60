#include "client/task_pool.h"

#include <signal.h>

#include <chrono>
#include <new>
#include <system_error>
#include <utility>

namespace sp {

Result<std::thread> StartThread(std::function<void()> body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return Error(StatusCode::kInternal, "pthread_sigmask failed");
  Result<std::thread> thread = Error(StatusCode::kLimit, "the system cannot start another thread");
  try {
    thread = std::thread(std::move(body));
  } catch (const std::system_error&) {
    // EAGAIN: the result says so.
  } catch (const std::bad_alloc&) {
    // The same.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

Status TaskPool::Add(std::function<void()> task) {
  std::lock_guard lock(mutex_);
  if (stop_) return {StatusCode::kClosed, "the client was closed"};
  const size_t pending = tasks_.size() + running_;
  if (pending >= tasks_max_) return {StatusCode::kLimit, std::to_string(tasks_max_) + " transfers are in progress"};
  if (pending >= threads_.size() && threads_.size() < threads_max_) {
    Result<std::thread> thread = StartThread([this] { Loop(); });
    if (thread) threads_.push_back(std::move(*thread));
    else if (threads_.empty()) return thread.error();
  }
  tasks_.push_back(std::move(task));
  wake_.notify_one();
  return {};
}

bool TaskPool::WaitIdle(Nanos deadline) {
  std::unique_lock lock(mutex_);
  return idle_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(deadline)),
                          [this] { return tasks_.empty() && running_ == 0; });
}

void TaskPool::Stop() {
  std::vector<std::thread> threads;
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    threads.swap(threads_);
  }
  wake_.notify_all();
  for (std::thread& thread : threads) thread.join();
}

void TaskPool::Loop() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    {
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      ++running_;
      lock.unlock();
      try {
        task();
      } catch (const std::bad_alloc&) {
        // Those who wait for what a task does are told by the task. What is left are goodbyes to the daemon, which finds out by itself when
        // this process ends.
      }
    }  // What the task holds goes before the pool counts as idle.
    lock.lock();
    if (--running_ == 0 && tasks_.empty()) idle_.notify_all();
  }
}

}  // namespace sp
