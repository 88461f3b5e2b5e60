// Signals as events of a loop instead of handlers.
#pragma once

#include <sys/types.h>

#include <optional>
#include <span>

#include "os/fd.h"

namespace sp {

// Blocks `signals` in the calling thread and in threads that it starts later. Spawned children start with none blocked.
Status BlockSignals(std::span<const int> signals);

// Reads signals that are blocked in every thread. Owned by the event loop.
class SignalFd {
 public:
  struct Received {
    int number;
    pid_t sender;  // 0 for the kernel.
  };

  static Result<SignalFd> Create(std::span<const int> signals);  // Blocks them too.
  int fd() const { return fd_.get(); }
  // The next pending signal; nothing when there is none. Equal signals that were sent in a row may arrive as one.
  Result<std::optional<Received>> Read() const;

 private:
  explicit SignalFd(Fd fd) : fd_(std::move(fd)) {}
  Fd fd_;
};

}  // namespace sp
