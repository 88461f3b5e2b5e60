// Time is passed in: the product uses SteadyClock, tests and the simulator a ManualClock.
// All values are nanoseconds on a monotonic clock of this machine; wall time decides nothing (I-33).
#pragma once

#include <chrono>
#include <cstdint>

namespace sp {

using Nanos = int64_t;
inline constexpr Nanos kNanosPerMilli = 1'000'000;
inline constexpr Nanos kNanosPerSecond = 1'000'000'000;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual Nanos Now() const = 0;
};

class SteadyClock final : public Clock {  // Thread-safe.
 public:
  Nanos Now() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
};

class ManualClock final : public Clock {  // Owned by one test thread.
 public:
  Nanos Now() const override { return now_; }
  void Advance(Nanos by) { now_ += by; }

 private:
  Nanos now_ = kNanosPerSecond;
};

}  // namespace sp
