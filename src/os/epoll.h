// epoll with 64-bit tokens. Owned by the event loop.
#pragma once

#include <sys/epoll.h>

#include <cstdint>
#include <span>
#include <vector>

#include "os/fd.h"

namespace sp {

class Epoll {
 public:
  struct Event {
    uint64_t token;
    uint32_t events;  // EPOLLIN, EPOLLOUT, EPOLLHUP, EPOLLERR...
  };

  static Result<Epoll> Create();

  Status Add(int fd, uint32_t events, uint64_t token);
  Status Modify(int fd, uint32_t events, uint64_t token);
  Status Remove(int fd);  // Before the descriptor is closed.

  // Waits up to `timeout_ms` (-1: for ever, 0: not at all). Empty on timeout, and when a signal handler ran. The span
  // is valid until the next call.
  Result<std::span<const Event>> Wait(int timeout_ms);

 private:
  explicit Epoll(Fd fd) : fd_(std::move(fd)) {}
  Status Control(int operation, int fd, uint32_t events, uint64_t token, const char* what);

  Fd fd_;
  std::vector<Event> events_;
};

}  // namespace sp
