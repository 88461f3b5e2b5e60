// "Only one process does this at a time", by flock on a file that holds the owner's pid.
#pragma once

#include <sys/types.h>

#include <string>

#include "os/fd.h"

namespace sp {

// Held until the object goes or its process ends. The file stays: removing it would let two owners lock two files of
// one name. Move-only. A copy in a forked child neither releases nor owns the lock.
class FileLock {
 public:
  // Creates the file (0600) when needed. kUnavailable, naming the owner's pid, when somebody has it; kDenied when the
  // file is not ours or not a plain file.
  static Result<FileLock> TryAcquire(const std::string& path);

  FileLock(FileLock&&) noexcept = default;
  FileLock& operator=(FileLock&& other) noexcept;
  ~FileLock();

 private:
  FileLock(Fd fd, pid_t owner) : fd_(std::move(fd)), owner_(owner) {}
  void Release();

  Fd fd_;
  pid_t owner_ = 0;
};

// The pid that was last written to the lock file, 0 when there is none. For messages only: it may be gone.
pid_t FileLockOwner(const std::string& path);

}  // namespace sp
