// How to cancel what is in progress. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "base/status.h"

namespace sp {

class CancelList {
 public:
  uint64_t Add(std::function<void(const Status&)> cancel) {
    std::lock_guard lock(mutex_);
    entries_.emplace(next_id_, std::move(cancel));
    return next_id_++;
  }
  void Remove(uint64_t id) {
    std::lock_guard lock(mutex_);
    entries_.erase(id);
  }
  // The functions do not throw.
  void CancelAll(const Status& why) {
    std::lock_guard lock(mutex_);
    for (const auto& [id, cancel] : entries_) cancel(why);
  }

 private:
  std::mutex mutex_;  // Held while a function runs; those only set flags.
  std::map<uint64_t, std::function<void(const Status&)>> entries_;
  uint64_t next_id_ = 1;
};

}  // namespace sp
