// Is that very process still alive? A pid alone cannot tell, because numbers are reused. Thread-safe.
#pragma once

#include <sys/types.h>

#include <cstdint>

#include "os/fd.h"

namespace sp {

// kNotFound when there is no such process; kUnavailable when the kernel has no pidfds.
Result<Fd> OpenPidfd(pid_t pid);

// False once the process has ended (also before its parent reaped it). When in doubt: true, because memory of a process
// that is taken for dead gets reused.
bool IsAlive(const Fd& pidfd);

// Clock ticks from boot to the start of the process (field 22 of /proc/<pid>/stat); with the pid it names one process
// for the life of this boot. 0 when /proc does not show it.
uint64_t ProcessStartTime(pid_t pid);

enum class SameProcess { kYes, kNo, kUnknown };

// Whether `pid` is still the process that had `start_time`. A zombie is still the same process. For where there is no
// pidfd.
SameProcess StillSameProcess(pid_t pid, uint64_t start_time);

}  // namespace sp
