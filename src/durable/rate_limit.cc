#include "durable/rate_limit.h"

#include <algorithm>

namespace sp {

Nanos RateLimit::Take(Nanos now, uint64_t bytes) {
  if (bytes_per_second_ == 0) return now;
  const std::lock_guard lock(mutex_);
  const Nanos begin = std::max(now, free_at_);
  // Seconds and the rest apart, so that no product of large numbers overflows.
  const auto rest = static_cast<Nanos>(static_cast<double>(bytes % bytes_per_second_) * 1e9 / static_cast<double>(bytes_per_second_));
  free_at_ = begin + static_cast<Nanos>(bytes / bytes_per_second_) * kNanosPerSecond + rest;
  return begin;
}

}  // namespace sp
