// Calls functions periodically on one thread: renews leases and pins while they are in use. Thread-safe.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/status.h"

namespace sp {

class KeepAlive {
 public:
  KeepAlive() = default;
  KeepAlive(const KeepAlive&) = delete;
  KeepAlive& operator=(const KeepAlive&) = delete;
  ~KeepAlive() { Stop(); }

  // Calls `renew` every `period` from now on, until it returns false or is removed; one that runs out of memory is called again. A late call delays the others, it does not make them
  // pile up. kLimit: the thread cannot be started; kClosed: stopped.
  Result<uint64_t> Add(Nanos period, std::function<bool()> renew);
  // Returns at once: a call that has begun may still be running, so `renew` owns what it uses.
  void Remove(uint64_t id);
  // Waits for a call in progress and ends the thread. Not to be called from a renewal.
  void Stop();

 private:
  struct Entry {
    Nanos period;
    Nanos next;
    std::shared_ptr<const std::function<bool()>> renew;  // Shared with a call in progress.
  };
  void Loop();

  std::mutex mutex_;  // Guards everything below. Not held during a call.
  std::condition_variable wake_;
  std::map<uint64_t, Entry> entries_;
  uint64_t next_id_ = 1;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace sp
