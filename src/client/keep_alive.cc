#include "client/keep_alive.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <utility>

#include "client/task_pool.h"
#include "os/unix_socket.h"

namespace sp {

Result<uint64_t> KeepAlive::Add(Nanos period, std::function<bool()> renew) {
  std::lock_guard lock(mutex_);
  if (stop_) return Error(StatusCode::kClosed, "the client was closed");
  if (!thread_.joinable()) {
    SP_ASSIGN_OR_RETURN(thread_, StartThread([this] { Loop(); }));
  }
  const uint64_t id = next_id_++;
  entries_.emplace(id, Entry{period, MonotonicNow() + period, std::make_shared<const std::function<bool()>>(std::move(renew))});
  wake_.notify_all();
  return id;
}

void KeepAlive::Remove(uint64_t id) {
  std::lock_guard lock(mutex_);
  entries_.erase(id);
}

void KeepAlive::Stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    entries_.clear();
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void KeepAlive::Loop() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    const auto next = std::ranges::min_element(entries_, {}, [](const auto& entry) { return entry.second.next; });
    if (next == entries_.end()) {
      wake_.wait(lock);
      continue;
    }
    const Nanos when = next->second.next;
    if (MonotonicNow() < when) {
      wake_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(when)));
      continue;
    }
    const uint64_t id = next->first;
    std::shared_ptr<const std::function<bool()>> renew = next->second.renew;
    lock.unlock();
    bool again = true;
    try {
      again = (*renew)();
    } catch (const std::bad_alloc&) {
      // The next one may find some; until then nothing is lost.
    }
    renew.reset();  // What it holds may go here, and not under the lock.
    lock.lock();
    const auto entry = entries_.find(id);
    if (entry == entries_.end()) continue;
    if (again) entry->second.next = MonotonicNow() + entry->second.period;
    else entries_.erase(entry);
  }
}

}  // namespace sp
