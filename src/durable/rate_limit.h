// So many bytes per second, over all that ask. Pure; thread-safe.
#pragma once

#include <cstdint>
#include <mutex>

#include "base/clock.h"

namespace sp {

class RateLimit {
 public:
  // 0: no limit.
  explicit RateLimit(uint64_t bytes_per_second) : bytes_per_second_(bytes_per_second) {}

  // Takes `bytes` and says when they may go, which may be at once. What was not used before `now` is lost: there are no bursts.
  Nanos Take(Nanos now, uint64_t bytes);

 private:
  const uint64_t bytes_per_second_;
  std::mutex mutex_;  // Guards what follows.
  Nanos free_at_ = 0;
};

}  // namespace sp
