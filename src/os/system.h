// Facts about this machine and its randomness. Thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

// The kernel's random id of this boot.
Result<Id128> BootId();

// What could be allocated now without swapping: the smaller of MemAvailable and, for our cgroup (v1 or v2) and each of
// its parents, limit minus usage that cannot be reclaimed. `root` is put before /proc and /sys, for tests.
Result<uint64_t> AvailableMemoryBytes(const std::string& root = "");

// Makes the calling thread, and what it starts, wait for everybody else: niceness 19, and the lowest class of disk access. What the system refuses stays
// as it was: less politeness is no error.
void YieldToOthers();

// Cryptographically strong random bytes.
void FillRandom(MutableByteSpan out);
Id128 RandomId128();

}  // namespace sp
