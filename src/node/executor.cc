#include "node/executor.h"

#include "os/system.h"

namespace sp {

Result<std::unique_ptr<Executor>> Executor::Create(uint32_t threads, size_t waiting_max, bool yielding) {
  SP_ASSIGN_OR_RETURN(EventFd wake, EventFd::Create());
  std::unique_ptr<Executor> executor(new Executor(std::move(wake), waiting_max));
  for (uint32_t i = 0; i < threads; ++i) {
    executor->threads_.emplace_back([e = executor.get(), yielding] {
      if (yielding) YieldToOthers();
      e->Run();
    });
  }
  return executor;
}

Executor::~Executor() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool Executor::Submit(Job job, bool large) {
  {
    const std::lock_guard lock(mutex_);
    if (waiting_.size() + waiting_large_.size() >= waiting_max_) return false;
    (large ? waiting_large_ : waiting_).push_back(std::move(job));
  }
  changed_.notify_one();
  return true;
}

void Executor::RunCompletions() {
  wake_.Drain();
  std::vector<Completion> done;
  {
    const std::lock_guard lock(mutex_);
    done.swap(done_);
  }
  for (const Completion& completion : done) completion();
}

void Executor::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !waiting_.empty() || TakesLarge(); });
    if (stopping_) return;
    const bool large = TakesLarge();
    std::deque<Job>& from = large ? waiting_large_ : waiting_;
    Job job = std::move(from.front());
    from.pop_front();
    large_runs_ = large_runs_ || large;
    large_was_last_ = large;
    lock.unlock();
    Completion completion = job();
    job = nullptr;  // What it holds goes here, not under the lock.
    lock.lock();
    if (large) {
      large_runs_ = false;
      changed_.notify_one();  // For the next large one, which a thread that sleeps may have passed over.
    }
    done_.push_back(std::move(completion));
    wake_.Notify();
  }
}

}  // namespace sp
