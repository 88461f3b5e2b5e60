// Owned file descriptors. Every descriptor this folder makes is close-on-exec.
#pragma once

#include <cstdint>
#include <utility>

#include "base/status.h"

namespace sp {

// Closes its descriptor when it goes. -1 means "none". Move-only; not thread-safe.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.Release()) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) Reset(other.Release());
    return *this;
  }
  ~Fd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset(int fd = -1);
  // A second descriptor of the same open file, close-on-exec. kLimit when the process has no number left.
  Result<Fd> Duplicate() const;

 private:
  int fd_ = -1;
};

struct Pipe {
  Fd read_end;
  Fd write_end;

  static Result<Pipe> Create();  // Blocking, close-on-exec.
};

// A counter another thread can wake an epoll loop with. Notify is thread-safe; Drain belongs to the loop.
class EventFd {
 public:
  static Result<EventFd> Create();
  int fd() const { return fd_.get(); }
  void Notify() const;
  // Notifications since the last Drain; 0 if there were none.
  uint64_t Drain() const;

 private:
  explicit EventFd(Fd fd) : fd_(std::move(fd)) {}
  Fd fd_;
};

// Raises the soft RLIMIT_NOFILE of this process to the hard limit. kLimit when even that is below `needed`.
Status EnsureFdLimit(uint64_t needed);

}  // namespace sp
