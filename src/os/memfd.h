// Anonymous shared memory: memfds that can be size-sealed, and exact positioned reads and writes. Thread-safe.
#pragma once

#include <cstdint>
#include <string>

#include "base/bytes.h"
#include "os/fd.h"

namespace sp {

// A memfd of `size_bytes`, mode 0600, close-on-exec, not sealed yet and not backed by pages yet.
Result<Fd> CreateMemfd(const std::string& name, uint64_t size_bytes);

// For ever: nobody can shrink or grow the file, nor add seals. To be done before a descriptor leaves the process,
// because a truncated file kills whoever reads a mapping of it (SIGBUS).
Status SealSize(int fd);

// A new descriptor of the same memory that cannot be written or mapped writable through. Not a boundary against the
// same user, who can re-open it read-write.
Result<Fd> ReopenReadOnly(int fd);

// kProtocol unless the file is exactly `expected_bytes` long and sealed against shrinking and growing. What a receiver
// of a descriptor checks before it maps it.
Status CheckSealedSize(int fd, uint64_t expected_bytes);

// Gives every page of the first `size_bytes` its memory now, charged to the cgroup of the calling process. Contents
// stay. kNoSpace when the system has no room (never SIGBUS); pages given so far stay until the file goes.
Status Prefault(int fd, uint64_t size_bytes);

// All of `out` / `data` at `offset`, in as many system calls as it takes. A file that ends early is kCorrupt.
Status PReadExact(int fd, MutableByteSpan out, uint64_t offset);
Status PWriteExact(int fd, ByteSpan data, uint64_t offset);

}  // namespace sp
