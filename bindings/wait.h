// Waiting that a Python program can interrupt.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>

#include "client/client_core.h"
#include "errors.h"

namespace sp::python {

// How long Ctrl-C may take to be noticed. Slicing costs a local wait nothing, a wait at the daemon one small message.
inline constexpr Nanos kSliceOfLocalWait = 100 * kNanosPerMilli;
inline constexpr Nanos kSliceOfDaemonWait = kNanosPerSecond;

inline Nanos After(Nanos time) {
  const Nanos now = MonotonicNow();
  return time > kForever - now ? kForever : now + time;
}

inline const Status& StatusOf(const Status& status) { return status; }
template <typename T>
Status StatusOf(const Result<T>& result) {
  return result ? Status() : result.error();
}

inline bool IsNotYet(const Status& status) { return status.code() == StatusCode::kDeadline; }

// Calls `wait(time)` without the GIL for at most `timeout` in all, a slice at a time, and lets signal handlers run in between. Returns its first
// answer after which there is no point in `go_on`, or its last one.
template <typename Wait, typename GoOn = bool (*)(const Status&)>
auto WaitInterruptibly(Nanos timeout, Nanos slice, const Wait& wait, GoOn go_on = &IsNotYet) {
  const Nanos end = After(timeout);
  for (;;) {
    const Nanos left = std::max<Nanos>(end - MonotonicNow(), 0);
    auto answer = Unlocked([&] { return wait(std::min(left, slice)); });
    if (left <= slice || !go_on(StatusOf(answer))) return answer;
    if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
  }
}

}  // namespace sp::python
