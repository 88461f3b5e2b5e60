#include "client/copy_engine_threads.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace sp {

int DefaultCopyThreads() {
  cpu_set_t cpus;
  // Fails on machines with more CPUs than the set can hold; those have two.
  if (sched_getaffinity(0, sizeof cpus, &cpus) != 0) return 2;
  // Ranks that torchrun started on one machine share its cores, unless somebody gave each its own.
  static const int ranks = [] {
    const char* const text = std::getenv("LOCAL_WORLD_SIZE");
    const long given = text == nullptr ? 1 : std::strtol(text, nullptr, 10);
    return static_cast<int>(std::clamp(given, 1L, 1L << 16));
  }();
  const int cores = CPU_COUNT(&cpus);
  const bool shared = cores == sysconf(_SC_NPROCESSORS_ONLN);
  return std::clamp(shared ? cores / ranks : cores, 1, 2);
}

struct CopyThreads::State {
  std::mutex run_mutex;  // Held for a whole Run; taken before `mutex`.
  std::mutex mutex;      // Guards everything below.
  std::condition_variable wake;
  std::condition_variable idle;
  const std::function<void()>* work = nullptr;
  int places = 0;  // How many more threads may join the current work.
  int active = 0;  // Threads inside `work`.
  bool stop = false;
  std::vector<std::thread> threads;

  void Loop() {
    std::unique_lock lock(mutex);
    for (;;) {
      wake.wait(lock, [this] { return stop || places > 0; });
      if (stop) return;
      --places;
      ++active;
      const std::function<void()>* current = work;
      lock.unlock();
      (*current)();
      lock.lock();
      if (--active == 0) idle.notify_all();
    }
  }

  // Called with `mutex` held. With fewer threads than asked for, the others do their share.
  void Grow(size_t count) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    // The trainer's signals are for the trainer's threads.
    if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return;
    try {
      while (threads.size() < count) threads.emplace_back([this] { Loop(); });
    } catch (const std::system_error&) {
      // No more threads to be had; the copy is slower, not wrong.
    } catch (const std::bad_alloc&) {
      // The same.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
};

CopyThreads::CopyThreads() : state_(std::make_unique<State>()), owner_(getpid()) {}

CopyThreads::~CopyThreads() {
  if (getpid() != owner_) {
    // A forked child has the locks in whatever state they were in, and nothing to join: it leaves them alone.
    static_cast<void>(state_.release());
    return;
  }
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void CopyThreads::Run(int threads, const std::function<void()>& work) {
  if (threads <= 1 || getpid() != owner_) return work();
  std::unique_lock running(state_->run_mutex, std::try_to_lock);
  if (!running) return work();
  const int helpers = std::min(threads, kCopyThreadsMax) - 1;
  {
    std::lock_guard lock(state_->mutex);
    if (state_->threads.size() < static_cast<size_t>(helpers)) state_->Grow(static_cast<size_t>(helpers));
    state_->work = &work;
    state_->places = helpers;
  }
  state_->wake.notify_all();
  work();
  std::unique_lock lock(state_->mutex);
  state_->places = 0;  // Whoever has not woken up by now is not waited for.
  state_->idle.wait(lock, [this] { return state_->active == 0; });
  state_->work = nullptr;
}

}  // namespace sp
